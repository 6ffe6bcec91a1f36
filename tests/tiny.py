"""Tiny models with random weights, inputs for them, and data small enough to train on in seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from avg_llava import AvgLlavaConfig, AvgLlavaForConditionalGeneration
from avg_llava.checkpoints.loading import build_from_backbones
from avg_llava.mini.tokenizer import build_tokenizer
from avg_llava.model.anyres import num_crops
from avg_llava.model.configuration import RouterConfig
from avg_llava.model.processing import AvgLlavaProcessor

CROP = 32  # pixels; `tiny_model` has patches of 4, an 8x8 grid
IMAGE_TOKEN = 64  # == vocabulary size: outside the embedding
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40)}
SIZES = [(16, 16), (40, 24), (24, 40), (32, 32), (50, 20)]  # (width, height) of the images of `write_data`
NOISE_SIZES = [(40, 40), (90, 30), (33, 70), (64, 64), (20, 25)]  # (width, height)


def vision_config(image_size: int = CROP, patch_size: int = 4, **fields: Any) -> CLIPVisionConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPVisionConfig(image_size=image_size, patch_size=patch_size, **{**sizes, **fields})


def towers() -> dict[str, PreTrainedConfig]:
    """Towers of all families in transformers: 8 x 8 patches of 4 pixels, SigLIP 7 x 7, of which two pixels are left."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    clip = {**sizes, "intermediate_size": 48, "patch_size": 4}
    dino = {**sizes, "mlp_ratio": 2, "image_size": CROP, "patch_size": 4}
    return {
        "clip": CLIPVisionConfig(**clip, image_size=CROP),
        "siglip": SiglipVisionConfig(**clip, image_size=30, vision_use_head=False),
        "siglip2": Siglip2VisionConfig(**clip, num_patches=64, vision_use_head=False),
        "dinov2": Dinov2Config(**dino),
        "dinov2_swiglu": Dinov2Config(**dino, use_swiglu_ffn=True),
        "dinov2_registers": Dinov2WithRegistersConfig(**dino, num_register_tokens=3),
    }


def language_config(tokenizer: PreTrainedTokenizerBase | None = None, **fields: Any) -> LlamaConfig:
    """A Llama of 64 tokens or of the tokenizer's vocabulary and special tokens."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    if tokenizer is not None:
        sizes["vocab_size"] = len(tokenizer)
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        fields = {**special, **fields}
    return LlamaConfig(**{**sizes, "num_attention_heads": 4, **fields})


def language_models(tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, PreTrainedConfig]:
    """Language models of the families that are tested; windows of sliding attention are shorter than the prompts."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "eos_token_id": 2}
    sizes |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1}
    if tokenizer is not None:
        sizes["vocab_size"] = len(tokenizer)
        sizes |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    grouped = {**sizes, "num_key_value_heads": 2}
    gemma = {**grouped, "head_dim": 24, "sliding_window": 6}
    return {
        "llama": LlamaConfig(**sizes),
        "mistral": MistralConfig(**grouped, sliding_window=6),
        "qwen2": Qwen2Config(**grouped, use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "qwen3": Qwen3Config(**grouped, head_dim=24, tie_word_embeddings=True),
        "gemma": GemmaConfig(**grouped, head_dim=24),
        "gemma2": Gemma2Config(**gemma, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        "gemma3": Gemma3TextConfig(**gemma, layer_types=["sliding_attention", "full_attention"]),
        "phi": PhiConfig(**sizes),  # its head has a bias
        "phi3": Phi3Config(**grouped, sliding_window=6),
        "gpt_neox": GPTNeoXConfig(**sizes, rope_parameters={"partial_rotary_factor": 0.5}),
        "mixtral": MixtralConfig(**grouped, num_local_experts=4),
    }


def tiny_config(
    vision: PreTrainedConfig | None = None, language: PreTrainedConfig | None = None, **fields: Any
) -> AvgLlavaConfig:
    """The configuration of `tiny_model`: levels of 4, 8, 16, 32 and 64 tokens per crop."""
    vision = vision or vision_config(num_hidden_layers=3)
    language = language or language_config()
    defaults = {
        "router_config": {"num_text_tokens": 12},
        "max_sequence_length": 2048,
        "image_token_index": language.vocab_size,
    }
    return AvgLlavaConfig(vision_config=vision, text_config=language, **{**defaults, **fields})


def tiny_model(seed: int = 0, **fields: Any) -> AvgLlavaForConditionalGeneration:
    """A random model whose parameters, norms and biases too, are far from their initial values."""
    torch.manual_seed(seed)
    model = AvgLlavaForConditionalGeneration(tiny_config(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def llava_next(config: AvgLlavaConfig, seed: int = 3) -> LlavaNextForConditionalGeneration:
    """Transformers' LLaVA-NeXT of the same shape, with random weights."""
    fields = config.to_dict()
    names = ("vision_config", "text_config", "image_grid_pinpoints", "image_token_index")
    torch.manual_seed(seed)
    return LlavaNextForConditionalGeneration(LlavaNextConfig(**{name: fields[name] for name in names})).eval()


def write_backbones(
    folder: Path,
    vision: PreTrainedConfig | None = None,
    language: PreTrainedConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> None:
    """Writes `folder`/vision (by default a CLIP tower) and `folder`/language (a Llama and its tokenizer).

    By default the tower has crops of 16 pixels and patches of 2 (levels 4, 8, 16, 32, 64), and the tokenizer is that
    of `bpe_tokenizer`.
    """
    tokenizer = tokenizer or bpe_tokenizer()
    vision = vision or vision_config(
        16, 2, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    language = language or language_config(
        tokenizer, hidden_size=32, intermediate_size=48, max_position_embeddings=4096
    )
    torch.manual_seed(seed)
    AutoModel.from_config(vision).save_pretrained(folder / "vision")
    AutoModelForCausalLM.from_config(language).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")


def make_checkpoint(
    folder: Path, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None, template: str | None = None
) -> Path:
    """Writes an AVG-LLaVA checkpoint with 16 patches per crop (levels 1, 2, 4, 8, 16), by default with the mini
    tokenizer.

    `template` is the one that the model says it was trained with.
    """
    tokenizer = tokenizer or build_tokenizer()
    vision = vision_config(patch_size=8, num_attention_heads=2)
    language = language_config(
        tokenizer,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        initializer_range=0.5,  # answers that depend on the image, and levels that differ
    )
    write_backbones(folder, vision, language, tokenizer, seed)
    router = RouterConfig(num_text_tokens=4, num_attention_heads=2)
    model = build_from_backbones(folder / "vision", folder / "language", router_config=router, template=template)
    processor = AvgLlavaProcessor.from_backbones(folder / "vision", folder / "language", model.config)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Llama's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["What colour is it? red green blue yellow", "USER: ASSISTANT: A chat"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def prompt(length: int, *image_indices: int, seed: int = 0) -> torch.Tensor:
    """(length,) random ids of `tiny_model`'s vocabulary with image placeholders at `image_indices`."""
    ids = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed))
    ids[0] = 1
    for index in image_indices:
        ids[index] = IMAGE_TOKEN
    return ids


def pad(prompts: list[torch.Tensor], side: str = "right", value: int = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=value, padding_side=side)


def images(config: AvgLlavaConfig, *sizes: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """`pixel_values` and `image_sizes` of random images of `sizes` (height, width).

    Missing crops are padded with noise: padding must not matter.
    """
    generator = torch.Generator().manual_seed(seed)
    most = max(num_crops(size, config) for size in sizes)
    pixels = torch.stack(
        [torch.randn(most, 3, CROP, CROP, generator=torch.Generator().manual_seed(sum(size))) for size in sizes]
    )
    for row, size in zip(pixels, sizes, strict=True):
        count = num_crops(size, config)
        row[count:] = torch.randn(row[count:].shape, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def noise_images() -> list[Image.Image]:
    """Five images of noise, of the sizes NOISE_SIZES."""
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in NOISE_SIZES
    ]


def record(
    identity: Any, question: str, answer: str, *images: str, more: list[tuple[str, str]] | None = None
) -> dict[str, Any]:
    """A LLaVA record of one question and answer, or of several with the (question, answer) pairs `more`."""
    turns = []
    for asked, answered in [(question, answer), *(more or [])]:
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    content = {"id": identity, "conversations": turns}
    if images:
        content["image"] = images[0] if len(images) == 1 else list(images)
    return content


def write_records(folder: Path, *records: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(list(records)))
    return path


def write_data(folder: Path, num_samples: int = 16, num_text_only: int = 4, two_images: bool = True) -> None:
    """Writes images, `captions.json` (stage 1) and `instruct.json` (stages 2 to 4)."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    names = list(COLOURS)
    captions, instruct = [], []
    for index in range(num_samples):
        colour = names[index % len(names)]
        width, height = SIZES[index % len(SIZES)]
        noise = generator.integers(-20, 20, (height, width, 3))
        pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
        file = f"images/{index}.png"
        Image.fromarray(pixels).save(folder / file)
        captions.append(record(f"caption-{index}", "<image>\nDescribe.", f"a {colour} picture", file))
        size = [("Is it big?", "yes" if width > 30 else "no")]
        more = size if index % 2 else []
        instruct.append(record(f"image-{index}", "<image>\nWhat colour is it?", colour, file, more=more))
    if two_images:
        question = "<image>\n<image>\nWhat are the colours?"
        instruct[-1] = record("two-images", question, "red and green", "images/0.png", "images/1.png")
    for index in range(num_text_only):
        instruct.append(record(f"text-{index}", "Say something short, please.", f"number {index}"))
    write_records(folder, *captions, name="captions.json")
    write_records(folder, *instruct, name="instruct.json")


def forget_checksums(folder: Path) -> None:
    """Lets the weights of a stage's result be changed."""
    manifest = json.loads((folder / "stage.json").read_text())
    del manifest["weights"]
    (folder / "stage.json").write_text(json.dumps(manifest))


def stage_values(stage: int, root: Path, world: Path) -> dict[str, Any]:
    """The values of a stage's YAML file: `world` holds backbones and data, `root` gets the runs."""
    if stage == 1:
        model = {
            "vision": str(world / "vision"),
            "language": str(world / "language"),
            "router": {"num_text_tokens": 6, "num_attention_heads": 2},
        }
    else:
        model = {"start": str(root / f"stage{stage - 1}")}
    file = "captions.json" if stage == 1 else "instruct.json"
    return {
        "stage": stage,
        "seed": 7,
        "model": model,
        "data": {
            "sources": [{"path": str(world / file)}],
            "template": "plain" if stage == 1 else "vicuna_v1",
            "group_by_modality_length": stage > 1,
            "num_workers": 0,
        },
        "optim": {
            "lr": 1e-3,
            "vision_lr": 2e-3,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "max_steps": 4,
        },
        "runtime": {"deepspeed": None, "precision": "fp32", "device": "cpu", "gradient_checkpointing": False},
        "logging": {"progress_bar": False, "trackers": []},
        "output": {"dir": str(root / f"stage{stage}")},
    }
