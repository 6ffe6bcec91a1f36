"""Published layouts against the libraries that wrote them; the table of docs/checkpoints.md is made here.

One entry of `ROWS` is one row of the table: what was published, which library wrote the folder that stands for it, and
a function that compares. `UPDATE_TABLE=1 pytest -n0 tests/checkpoints/test_published.py` writes the page.
"""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
    Qwen2Config,
)

from avg_llava import load, load_model
from avg_llava.checkpoints.loading import build_from_backbones
from avg_llava.checkpoints.weight_files import read_tensors
from avg_llava.evaluation.llava_next import expand_placeholders
from tests.checkpoints.test_parts import adapt
from tests.model.test_towers import library_states
from tests.open_clip_process import run_with_open_clip
from tests.parity.golden import GOLDEN, SIZES, golden, golden_image
from tests.tiny import bpe_tokenizer, llava_next, noise_images, tiny_config, towers, write_backbones

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- rows of tests/checkpoints/test_published.py -->\n", "<!-- end of rows -->\n"
BOUND = 1e-5
NUM_NEW = 8


class Measured(NamedTuple):
    """Comparison with the library that wrote a folder.

    Attributes:
        same_ids: Token ids of prompts and greedy answers are equal.
        logits: Largest difference of logits.
        tower: Largest difference of the hidden states that the projector gets.
    """

    same_ids: bool
    logits: float
    tower: float


@dataclass(frozen=True)
class Row:
    """A row of the table: what the folder stands for, the library that wrote it, and the comparison."""

    published: str
    library: str
    measure: Callable[[Path], Measured]
    starts: str = "inference at a level, stage 3"

    def line(self, measured: Measured) -> str:
        """The row's text; differences are given by their bound, as the last bits depend on the machine."""
        figures = ["<= 1e-5" if value <= BOUND else f"{value:.1e}" for value in (measured.logits, measured.tower)]
        cells = [self.published, self.library, "yes" if measured.same_ids else "no", *figures, self.starts]
        return f"| {' | '.join(cells)} |\n"


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours - theirs).abs().max().item()


def tower_difference(model) -> float:
    """Hidden states of the tower against transformers' own forward pass with the same weights."""
    config = model.config
    reference = AutoModel.from_config(config.vision_config).eval()
    reference.load_state_dict(model.model.vision_tower.state_dict())
    pixels = torch.randn(2, 3, config.crop_size, config.crop_size, generator=torch.Generator().manual_seed(0))
    theirs = library_states(reference, pixels, config.vision_feature_layer)
    with torch.no_grad():
        ours = config.tower.encode(model.model.vision_tower, pixels, config.num_vision_layers)
    return difference(ours, theirs[:, config.num_prefix_tokens :])


def greedy(model, inputs, **kwargs) -> list[int]:
    """Ids of a greedy answer; the end of sequence is an id like any other."""
    return model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=-1, **kwargs)[0].tolist()


# ---- recorded by older libraries: tests/data/checkpoints -----------------------------------------------------------


def recorded_images() -> dict[tuple[int, int], Image.Image]:
    """The images of tests/data/checkpoints/README.md, by (width, height)."""
    generator = np.random.RandomState(0)
    sizes = [(500, 400), (336, 336), (1000, 200), (301, 777), (672, 672), (640, 427)]
    return {
        (width, height): Image.fromarray(generator.randint(0, 255, (height, width, 3)).astype(np.uint8))
        for width, height in sizes
    }


def collapsed(ids: list[int], image_token: int) -> list[int]:
    """Ids with one placeholder for each run of them."""
    return [token for index, token in enumerate(ids) if token != image_token or ids[index - 1] != image_token]


def compare_recorded(
    folder: Path, reference: str, round_positions: Callable, image_token: int, recrop: Callable | None = None
) -> Measured:
    """Compares with `reference`.

    Args:
        round_positions: Rounds the rotary tables as the recording library had them.
        image_token: Stands for an image in the recorded ids.
        recrop: Gives the pixels of an image as the recording library cut it, or None where it cut as this package does.
    """
    model, processor = load(folder, dtype=torch.float32)
    rotary = model.model.language_model.rotary_emb
    round_positions(rotary)
    images, worst, same = recorded_images(), 0.0, True
    for entry in json.loads((DATA / reference).read_text()):
        inputs = processor(images=images[tuple(entry["size"])], text=entry["prompt"])
        ids = inputs["input_ids"][0].tolist()
        theirs = [model.config.image_token_id if token == image_token else token for token in entry["ids"]]
        same &= ids == collapsed(theirs, model.config.image_token_id)
        recropped = recrop and recrop(images[tuple(entry["size"])], processor.image_processor)
        if recropped is not None:
            inputs["pixel_values"] = recropped
        with torch.no_grad():
            output = model(**inputs, granularity=576, logits_to_keep=1)
        same &= int(output.num_visual_tokens) + len(ids) - 1 == entry["length"]
        same &= greedy(model, inputs, granularity=576) == entry["gen"][-NUM_NEW:]
        worst = max(worst, difference(output.logits[0, -1], torch.tensor(entry["last"])))
    return Measured(same, worst, tower_difference(model))


def bfloat16_tables(rotary) -> None:
    """The recording code computed sines and cosines once, in the data type of the checkpoint."""
    rotary.register_forward_hook(lambda module, inputs, tables: tuple(each.bfloat16().float() for each in tables))


def half_frequencies(rotary) -> None:
    """The recording code converted a float16 model to float32, with its frequencies."""
    rotary.inv_freq.copy_(rotary.inv_freq.half().float())


def original_llava(folder: Path) -> Measured:
    return compare_recorded(DATA / "llava16_vicuna", "llava16_vicuna.ref.json", bfloat16_tables, -200)


def open_llava_next(folder: Path) -> Measured:
    shutil.copytree(DATA / "llava16_vicuna", folder, dirs_exist_ok=True)
    shutil.copy(DATA / "open_llava_next_vicuna" / "config.json", folder)
    return compare_recorded(folder, "llava16_vicuna.ref.json", bfloat16_tables, -200)


def crops_of_445(image: Image.Image, settings) -> torch.Tensor | None:
    """The crops of the recorded image whose padding is odd: 4.45 pads a row too few, and resizes the lowest tiles."""
    if image.size != (640, 427):
        return None
    side, canvas, height = 336, 672, 449
    above = (canvas - height) // 2
    fitted = Image.new("RGB", (canvas, height + 2 * above))
    fitted.paste(image.resize((canvas, height), Image.Resampling.BICUBIC), (0, above))
    crops = [image.resize((side, side), Image.Resampling.BICUBIC)]
    for top, left in ((0, 0), (0, side), (side, 0), (side, side)):
        tile = fitted.crop((left, top, left + side, min(top + side, fitted.height)))
        width = int(side * side / tile.height)
        tile = tile.resize((width, side), Image.Resampling.BICUBIC)
        crops.append(tile.crop(((width - side) // 2, 0, (width - side) // 2 + side, side)))
    pixels = (np.stack(crops).astype(np.float64) * settings.rescale_factor).astype(np.float32)
    normalised = (pixels - np.float32(settings.image_mean)) / np.float32(settings.image_std)
    return torch.from_numpy(normalised).permute(0, 3, 1, 2)[None]


def older_transformers(folder: Path) -> Measured:
    return compare_recorded(DATA / "hf45_vicuna", "hf45_vicuna.ref.json", half_frequencies, 1000, crops_of_445)


def pickled_backbones(folder: Path) -> Measured:
    model = build_from_backbones(DATA / "clip_bin", DATA / "vicuna_bin", dtype=torch.float32)
    language = AutoModelForCausalLM.from_pretrained(DATA / "vicuna_bin", dtype=torch.float32)
    tower = CLIPVisionModel.from_pretrained(DATA / "clip_bin")
    ids = {"input_ids": torch.arange(1, 40)[None]}
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        ours = model.config.tower.encode(model.model.vision_tower, pixels, model.config.num_vision_layers)
        logits = difference(model(**ids).logits, language(**ids).logits)
    same = greedy(model, ids) == greedy(language, ids)[-NUM_NEW:]
    return Measured(same, logits, difference(ours, theirs))


# ---- recorded from the released AVG-LLaVA: tests/data/golden -------------------------------------------------------


def released(folder: Path, levels: list[str]) -> Measured:
    """Greedy answers at `levels` ("router": the chosen one) and the logits of their first step."""
    model = load_model(folder, dtype=torch.float32)
    assert model.config.behavior == "released"
    tensors, about = golden("G_generate")
    worst, same = 0.0, True
    processor = released_processor(model.config)
    for name in ("sq192", "w300x200", "t110x410"):
        image = golden_image(*SIZES[name], list(SIZES).index(name))
        ids = tensors[f"{name}/prompt_ids"].where(tensors[f"{name}/prompt_ids"] != -200, model.config.image_token_id)
        inputs = {"input_ids": ids, **processor([image], return_tensors="pt")}
        for level in levels:
            forced = {} if level == "router" else {"granularity": int(level)}
            with torch.no_grad():
                output = model(**inputs, **forced)
            same &= output.logits.shape[1] == about["cases"][name][level]["prefill_len"]
            same &= greedy(model, inputs, **forced) == tensors[f"{name}/{level}/ids"][-NUM_NEW:].tolist()
            worst = max(worst, difference(output.logits[0, -1], tensors[f"{name}/{level}/first_step_logits"]))
    return Measured(same, worst, tower_difference(model))


def released_processor(config):
    from avg_llava.model.processing import AvgLlavaImageProcessor

    crop = config.crop_size
    return AvgLlavaImageProcessor(
        size={"shortest_edge": crop},
        crop_size={"height": crop, "width": crop},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )


LEVELS = ["36", "72", "144", "288", "576"]


def avg_llava(folder: Path) -> Measured:
    return released(GOLDEN / "checkpoint", ["router", *LEVELS])


def avg_llava_stage3(folder: Path) -> Measured:
    """The same without the router: its configuration lists levels, and levels 288 and 72 lose tokens."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(GOLDEN / "checkpoint", folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if ".router." not in k}, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"router_select": False}))
    return released(folder, LEVELS)


# ---- written by the installed transformers -------------------------------------------------------------------------

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LANGUAGE_MODELS = {
    "Vicuna": LlamaConfig(**SHAPE, rope_theta=1e4),
    "Mistral": MistralConfig(**SHAPE, num_key_value_heads=2, rope_theta=1e6, sliding_window=None),
    "Llama-3": LlamaConfig(**SHAPE, num_key_value_heads=2, rope_theta=5e5),
    "Qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2, rope_theta=1e6),
}


def write_llava_next(folder: Path, language, suffix: str) -> LlavaNextForConditionalGeneration:
    """Saves a LLaVA-NeXT with its processor; the placeholder is a token inside a padded vocabulary."""
    tokenizer = bpe_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    language = type(language)(**language.to_dict() | {"vocab_size": -(-len(tokenizer) // 64) * 64, "eos_token_id": 2})
    config = tiny_config(language=language, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    model = llava_next(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.generation_config.eos_token_id = [2, 7]
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=model.config.image_grid_pinpoints,
            image_mean=[0.4, 0.5, 0.6],
            image_std=[0.2, 0.3, 0.4],
            resample=2,
        ),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if suffix == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return model


def compare_llava_next(folder: Path, reference, base: Path | None = None) -> Measured:
    """Compares a folder of a LLaVA-NeXT with the library's model of it and its processor, which may be in `base`."""
    model, processor = load(folder, dtype=torch.float32)
    theirs = LlavaNextProcessor.from_pretrained(base or folder, backend="pil")
    assert model.generation_config.eos_token_id == [2, 7]
    prompt = "USER: <image>\nWhat colour is it? ASSISTANT:"
    worst, same = 0.0, True
    for image in (each for each in noise_images() if each.height < 2 * each.width):  # not where Pillow 13 differs
        ours, expected = processor(images=image, text=prompt), theirs(images=image, text=prompt, return_tensors="pt")
        assert torch.equal(ours["pixel_values"], expected["pixel_values"])
        whole = expand_placeholders(ours["input_ids"][0], ours["image_sizes"], model)
        same &= torch.equal(whole, expected["input_ids"][0])
        with torch.no_grad():
            logits = model(**ours, granularity=64).logits
            worst = max(worst, difference(logits, reference(**expected).logits))
        same &= greedy(model, ours, granularity=64) == greedy(reference, expected)[-NUM_NEW:]
    return Measured(same, worst, tower_difference(model))


def current(name: str, suffix: str) -> Callable[[Path], Measured]:
    return lambda folder: compare_llava_next(folder, write_llava_next(folder, LANGUAGE_MODELS[name], suffix))


def transformers_llava15(folder: Path) -> Measured:
    """A start for stages: images are tiled from now on, so text and the tower are compared."""
    parts = tiny_config()
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=parts.vision_config, text_config=parts.text_config, image_token_index=63)
    reference = LlavaForConditionalGeneration(config).eval()
    reference.save_pretrained(folder)
    model = load_model(folder)
    ids = {"input_ids": torch.arange(1, 40)[None]}
    with torch.no_grad():
        logits = difference(model(**ids).logits, reference(**ids).logits)
        pixels = torch.randn(2, 3, 32, 32)
        theirs = reference.model.get_image_features(pixels).pooler_output
        tower = difference(model.model.encode_crops(pixels), torch.stack(list(theirs)))
    return Measured(greedy(model, ids) == greedy(reference, ids)[-NUM_NEW:], logits, tower)


def original_llava15(folder: Path) -> Measured:
    """The folder of LLaVA-1.6 with the fields of 1.5, a start like the above; its text against transformers' Llama."""
    shutil.copytree(DATA / "llava16_vicuna", folder, dirs_exist_ok=True)
    raw = json.loads((folder / "config.json").read_text())
    changes = {"image_aspect_ratio": "pad", "image_grid_pinpoints": None, "tokenizer_model_max_length": 2048}
    del raw["mm_patch_merge_type"]
    (folder / "config.json").write_text(json.dumps(raw | changes))
    model = load_model(folder, dtype=torch.float32)
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    language = LlamaForCausalLM(LlamaConfig(**{name: raw[name] for name in names})).eval()
    ours = ("model.vision_tower.", "model.mm_projector.", "model.image_newline")
    language.load_state_dict({k: v.float() for k, v in read_tensors(folder).items() if not k.startswith(ours)})
    ids = {"input_ids": torch.arange(1, 40)[None]}
    with torch.no_grad():
        logits = difference(model(**ids).logits, language(**ids).logits)
    return Measured(greedy(model, ids) == greedy(language, ids)[-NUM_NEW:], logits, tower_difference(model))


def peft_adapters(folder: Path) -> Measured:
    base = write_llava_next(folder / "base", LANGUAGE_MODELS["Vicuna"], "safetensors")
    adapt(base, folder / "lora", folder / "base")
    fresh = LlavaNextForConditionalGeneration.from_pretrained(folder / "base")
    merged = PeftModel.from_pretrained(fresh, folder / "lora").merge_and_unload()
    return compare_llava_next(folder / "lora", merged, folder / "base")


def write_language_model(folder: Path):
    write_backbones(folder)
    return AutoModelForCausalLM.from_pretrained(folder / "language").eval()


def compare_backbones(vision: Path, language: Path, reference, tower: Callable = tower_difference) -> Measured:
    """Compares a model of two backbones: texts with a causal LM, crops by `tower`."""
    model = build_from_backbones(vision, language)
    ids = {"input_ids": torch.arange(1, 40)[None]}
    with torch.no_grad():
        logits = difference(model(**ids).logits, reference(**ids).logits)
    return Measured(greedy(model, ids) == greedy(reference, ids)[-NUM_NEW:], logits, tower(model))


def tower_of_transformers(name: str) -> Callable[[Path], Measured]:
    """A tower of `towers`, with pooling head where the library writes one."""

    def measure(folder: Path) -> Measured:
        config = towers()[name]
        if hasattr(config, "vision_use_head"):
            config.vision_use_head = True
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder / "tower")
        return compare_backbones(folder / "tower", folder / "language", write_language_model(folder))

    return measure


def tower_of_open_clip(folder: Path) -> Measured:
    """Measured in a process that has open_clip."""
    process = run_with_open_clip("tests.checkpoints.open_clip_row", str(folder))
    assert process.returncode == 0, process.stdout + process.stderr
    return Measured(*json.loads(process.stdout.splitlines()[-1]))


TRANSFORMERS, PEFT = (f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "peft"))
OPEN_CLIP = "open_clip 3.3.0"  # as in constraints.txt; the process above checks it
TOWERS = {
    "google/siglip-so400m-patch14-384": "siglip",
    "google/siglip2-base-patch16-naflex": "siglip2",
    "facebook/dinov2-large": "dinov2",
    "facebook/dinov2-giant": "dinov2_swiglu",
    "facebook/dinov2-with-registers-large": "dinov2_registers",
}
OLD = "transformers 4.37 (bin)"
START = "stages 2 and 3"
ROWS = [
    Row("`lmsys/vicuna-7b-v1.5` with `openai/clip-vit-large-patch14-336`", OLD, pickled_backbones, "stage 1"),
    Row("`liuhaotian/llava-v1.6-vicuna-7b` (`llava`)", "LLaVA", original_llava),
    Row("`Lin-Chen/open-llava-next-vicuna-7b` (`llava_llama`)", "Open-LLaVA-NeXT", open_llava_next),
    Row("`liuhaotian/llava-v1.5-7b` (`pad`): text", "LLaVA", original_llava15, START),
    Row("`zhibinlan/AVG-LLaVA`, routed and at every level", "AVG-LLaVA", avg_llava, "inference, all later stages"),
    Row("`zhibinlan/AVG-LLaVA-Stage3`, at every level", "AVG-LLaVA", avg_llava_stage3, "inference at a level, stage 4"),
    Row("`llava-hf/llava-v1.6-vicuna-7b-hf` (older keys)", "transformers 4.45", older_transformers),
    *(
        Row(f"LLaVA-NeXT with {name} ({suffix})", TRANSFORMERS, current(name, suffix))
        for name in LANGUAGE_MODELS
        for suffix in ("safetensors", "bin")
    ),
    Row("`llava-hf/llava-1.5-7b-hf`: text and projected crops", TRANSFORMERS, transformers_llava15, START),
    Row("LoRA of a LLaVA-NeXT, merged", PEFT, peft_adapters),
    *(
        Row(f"`{published}`", TRANSFORMERS, tower_of_transformers(name), "stage 1")
        for published, name in TOWERS.items()
    ),
    Row("`open_clip:hf-hub:laion/CLIP-ViT-B-16-laion2B-s34B-b88K`", OPEN_CLIP, tower_of_open_clip, "stage 1"),
]


def table_of(page: str) -> list[str]:
    """Lines of the table's rows."""
    assert page.count(BEGIN) == page.count(END) == 1
    return page.split(BEGIN)[1].split(END)[0].splitlines(keepends=True)[2:]


@pytest.mark.parametrize("index", range(len(ROWS)), ids=[row.published for row in ROWS])
def test_row(tmp_path, index):
    row = ROWS[index]
    measured = row.measure(tmp_path)
    assert measured.same_ids
    assert measured.logits <= BOUND
    assert measured.tower <= BOUND
    page = PAGE.read_text(encoding="utf-8")
    line = row.line(measured)
    if os.environ.get("UPDATE_TABLE"):
        rows = table_of(page)[: len(ROWS)]
        rows += ["\n"] * (len(ROWS) - len(rows))
        rows[index] = line
        head = page.split(BEGIN)[1].splitlines(keepends=True)[:2]
        page = "".join([page.split(BEGIN)[0], BEGIN, *head, *rows, END, page.split(END)[1]])
        PAGE.write_text(page, encoding="utf-8")
    assert table_of(page)[index] == line, "UPDATE_TABLE=1 writes the page"


def test_the_table_has_no_other_rows():
    assert len(table_of(PAGE.read_text(encoding="utf-8"))) == len(ROWS)
