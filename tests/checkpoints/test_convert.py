"""Conversions: round trips to the bit, what transformers' own class computes, what is dropped, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from avg_llava import cli
from avg_llava.checkpoints import same_logits
from avg_llava.checkpoints.checkpoint import invert, rename_keys
from avg_llava.checkpoints.checksums import MANIFEST_NAME, compute_checksums
from avg_llava.checkpoints.convert import convert, plan_conversion
from avg_llava.checkpoints.formats import TRANSFORMERS_KEYS, open_checkpoint
from avg_llava.checkpoints.loading import load, load_model, load_model_config, open_processor
from avg_llava.checkpoints.original import ORIGINAL_KEYS
from avg_llava.checkpoints.shards import PlannedTensor, split_shards, write_shards
from avg_llava.checkpoints.weight_files import INDEX_NAME, CheckpointError, fingerprint, read_tensors, stored_tensors
from tests.parity.golden import GOLDEN
from tests.tiny import make_checkpoint, tiny_model

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
LLAVA16, HF45, RELEASED = DATA / "llava16_vicuna", DATA / "hf45_vicuna", GOLDEN / "checkpoint"
TEXTS = ["What is it?", " two  spaces", "<s>\n</s> x", "ÄÖ 漢字 \U0001f600", "USER: hi ASSISTANT: yes</s>"]
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown in this image?"}]}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A checkpoint of this package with a router of behavior "paper"."""
    return make_checkpoint(tmp_path_factory.mktemp("own"))


def run(source, output, target, check=False, **options):
    return convert(plan_conversion(source, target), output, check=check, **options)


def checked(source, output, target):
    return run(source, output, target, check=True)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def ids_of(folder):
    tokenizer = open_processor(folder, load_model_config(folder)).tokenizer
    return [tokenizer(text).input_ids for text in TEXTS]


def reference(name, index):
    """What the library that wrote a checkpoint computes of an image, and the image."""
    generator = np.random.RandomState(0)
    for width, height in [(500, 400), (336, 336), (1000, 200), (301, 777), (672, 672), (640, 427)]:
        pixels = generator.randint(0, 255, (height, width, 3)).astype(np.uint8)
        entries = json.loads((DATA / f"{name}.ref.json").read_text())
        entry = next((entry for entry in entries if entry["size"] == [width, height]), None)
        if entry is not None and not index:
            return entry, Image.fromarray(pixels)
        index -= entry is not None
    raise AssertionError("no such image")


@pytest.mark.parametrize(
    ("source", "layout"),
    [(LLAVA16, "original"), (RELEASED, "original"), (HF45, "llava-next")],
    ids=lambda value: str(value),
)
def test_there_and_back_is_bit_exact(tmp_path, source, layout):
    assert checked(source, tmp_path / "avg", "avg") == 0
    assert checked(tmp_path / "avg", tmp_path / "back", layout) == 0
    assert fingerprint(stored_tensors(tmp_path / "back")) == fingerprint(stored_tensors(source))
    before, after = config_of(source), config_of(tmp_path / "back")
    for key in (
        *(
            "hidden_size",
            "num_hidden_layers",
            "vocab_size",
            "rope_theta",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        ),
        *("image_grid_pinpoints", "mm_vision_select_layer", "mm_patch_merge_type", "tokenizer_model_max_length"),
        *(
            "vis_token_granularity",
            "router_select",
            "filtered_text_num",
            "image_aspect_ratio",
            "max_position_embeddings",
        ),
        *("image_token_index", "vision_feature_layer", "vision_feature_select_strategy", "image_seq_length"),
    ):
        wanted = before.get(key)
        assert after.get(key) == (json.loads(wanted) if isinstance(wanted, str) and wanted.startswith("[") else wanted)
    for part in ("text_config", "vision_config"):
        assert after.get(part, {}).items() >= before.get(part, {}).items()
    if source == HF45:
        rendered = json.loads((DATA / "hf45_vicuna.ref.json").read_text())[0]["template"]
        for folder in ("avg", "back"):
            processor = AutoProcessor.from_pretrained(tmp_path / folder, trust_remote_code=False)
            assert processor.apply_chat_template([QUESTION], add_generation_prompt=True) == rendered
    if source != RELEASED:
        assert ids_of(tmp_path / "avg") == ids_of(source)
        assert ids_of(tmp_path / "back") == ids_of(source)
        generation = "generation_config.json"
        assert (tmp_path / "back" / generation).read_bytes() == (source / generation).read_bytes()


def test_a_padded_vocabulary_stays_padded_and_is_cut_for_the_original_code(tmp_path):
    run(HF45, tmp_path / "avg", "avg")
    assert stored_tensors(tmp_path / "avg")["lm_head.weight"].shape == (1024, 64)
    run(tmp_path / "avg", tmp_path / "original", "original")
    assert config_of(tmp_path / "original")["vocab_size"] == 1000
    cut = read_tensors(tmp_path / "original")["model.embed_tokens.weight"]
    assert torch.equal(cut, read_tensors(HF45)["language_model.model.embed_tokens.weight"][:1000])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "original", trust_remote_code=False)
    assert (len(tokenizer), tokenizer.pad_token) == (1000, "<unk>")


def test_transformers_own_class_continues_with_the_ids_of_the_original_code(tmp_path):
    """`llava16_vicuna.ref.json` was computed by the original code; -200 stands for the image there."""
    run(LLAVA16, tmp_path / "next", "llava-next")
    model, report = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "next", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "next", trust_remote_code=False)
    for index in (0, 1):
        expected, image = reference("llava16_vicuna", index)
        inputs = processor(images=image, text="<image>", return_tensors="pt")
        tokens = [model.config.image_token_index] * (expected["length"] - len(expected["ids"]) + 1)
        place = expected["ids"].index(-200)
        ids = torch.tensor([[*expected["ids"][:place], *tokens, *expected["ids"][place + 1 :]]])
        assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == len(tokens)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            answer = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
            last = model(**inputs).logits[0, -1, :1000]
        assert answer.tolist() == [token for token in expected["gen"] if token != 1][:8]
        torch.testing.assert_close(last, torch.tensor(expected["last"]), rtol=0, atol=1e-4)


def test_transformers_own_class_and_processor_answer_as_this_package_does(own, tmp_path):
    run(own, tmp_path / "next", "llava-next")
    theirs = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "next")
    processor = AutoProcessor.from_pretrained(tmp_path / "next", trust_remote_code=False)
    ours, our_processor = load(own)
    image = Image.effect_noise((70, 40), 80).convert("RGB")
    prompt = processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    assert prompt == our_processor.apply_chat_template([QUESTION], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    answer = theirs.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    is_image = inputs["input_ids"][0] == theirs.config.image_token_index
    ids = inputs["input_ids"][0].masked_fill(is_image, ours.config.image_token_id)
    ids = ids[~(is_image & is_image.roll(1))]  # one placeholder
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    finest = ours.config.granularities[-1]
    expected = ours.generate(input_ids=ids[None], **images, granularity=finest, do_sample=False, max_new_tokens=8)
    assert answer.tolist() == expected[0].tolist()


def test_the_vocabulary_grows_by_mean_rows_that_hold_the_placeholder(own, tmp_path):
    run(own, tmp_path / "next", "llava-next")
    config = config_of(tmp_path / "next")
    rows, number = config["text_config"]["vocab_size"], config["image_token_index"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "next", trust_remote_code=False)
    assert number == tokenizer.convert_tokens_to_ids("<image>") < rows
    assert rows % 64 == 0
    for name, old_name in {
        "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "language_model.lm_head.weight": "lm_head.weight",
    }.items():
        old, new = load_model(own).state_dict()[old_name], read_tensors(tmp_path / "next")[name]
        assert torch.equal(new[: len(old)], old)
        mean = old.double().mean(0)
        torch.testing.assert_close(new[len(old) :].double(), mean.expand(rows - len(old), -1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("target", ["avg", "original", "llava-next"])
@pytest.mark.parametrize("source", [LLAVA16, HF45, RELEASED], ids=lambda path: path.name)
def test_the_dry_run_lists_every_weight_once_and_writes_nothing(tmp_path, capsys, source, target):
    words = ["convert", str(source), str(tmp_path / "output"), "--to", target, "--dry-run", "--json"]
    assert cli.main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "output").exists()
    assert [entry["key"] for entry in facts["weights"]] == sorted(stored_tensors(source))
    run(source, tmp_path / "output", target)
    kept = [entry["target"] for entry in facts["weights"] if entry["target"]]
    assert sorted(kept) == sorted(stored_tensors(tmp_path / "output"))
    dropped = [entry for entry in facts["weights"] if entry["target"] is None]
    assert all("router" in entry["key"] and "no router" in entry["note"] for entry in dropped)
    assert bool(dropped) == (source == RELEASED and target == "llava-next")


def test_the_dry_run_is_a_table_too(capsys, tmp_path, own):
    words = ["convert", str(own), str(tmp_path / "output"), "--to", "original", "--dry-run"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "the original code's router works differently" in text
    assert "note: the output is a LLaVA-NeXT without router" in text


def test_the_original_code_gets_a_router_only_if_it_was_trained_as_there(own, tmp_path):
    run(own, tmp_path / "original", "original")
    assert not any("router" in name for name in stored_tensors(tmp_path / "original"))
    assert "vis_token_granularity" not in config_of(tmp_path / "original")
    assert load_model(tmp_path / "original").config.behavior == "paper"
    run(RELEASED, tmp_path / "released", "original")
    assert load_model(tmp_path / "released").config.behavior == "released"
    tower = CLIPVisionModel.from_pretrained(tmp_path / "released" / "vision_tower")
    inside = load_model(RELEASED).model.vision_tower.state_dict()
    assert all(torch.equal(tensor, inside[name]) for name, tensor in tower.state_dict().items())
    settings = json.loads((tmp_path / "released" / "vision_tower" / "preprocessor_config.json").read_text())
    assert (settings["image_processor_type"], settings["size"]) == ("CLIPImageProcessor", {"shortest_edge": 96})


def test_the_output_of_a_source_without_router_gets_a_new_one_and_starts_stage_4(tmp_path):
    from avg_llava.checkpoints.routing_model import load_routing_model

    run(HF45, tmp_path / "avg", "avg")
    model = load_routing_model(tmp_path / "avg")
    assert torch.isfinite(model.model.router.voter).all()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved").model.router.voter, model.model.router.voter)


SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3["original_max_position_embeddings"] = 1024


@pytest.mark.parametrize(
    ("language", "model_type", "rope"),
    [
        (
            MistralConfig(**SIZES, num_key_value_heads=2, rope_theta=1e6, sliding_window=None),
            "llava_mistral",
            (1e6, None),
        ),
        (
            Qwen2Config(**SIZES, num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=True),
            "llava_qwen",
            (1e6, None),
        ),
        (LlamaConfig(**SIZES, rope_theta=5e5, rope_scaling=dict(LLAMA_3)), "llava_llama", (5e5, LLAMA_3)),
    ],
    ids=["mistral", "qwen2 tied", "llama 3"],
)
def test_language_models_keep_their_type_and_their_positions(tmp_path, language, model_type, rope):
    """The configurations of the outputs are in the form that transformers wrote before version 5."""
    tiny_model(language=language).save_pretrained(tmp_path / "own")
    assert checked(tmp_path / "own", tmp_path / "original", "original") == 0
    assert checked(tmp_path / "own", tmp_path / "next", "llava-next") <= 1e-6
    flat, nested = config_of(tmp_path / "original"), config_of(tmp_path / "next")["text_config"]
    assert flat["model_type"] == model_type
    assert nested["model_type"] == language.model_type
    for fields in (flat, nested):
        assert (fields["rope_theta"], fields["rope_scaling"]) == rope
        assert "rope_parameters" not in fields
    assert checked(tmp_path / "next", tmp_path / "back", "avg") <= 1e-6


@pytest.mark.parametrize(
    ("fields", "target", "message"),
    [
        ({"language": GPTNeoXConfig(**SIZES)}, "original", "cannot hold a language model of type 'gpt_neox'"),
        ({"language": GPTNeoXConfig(**SIZES)}, "llava-next", "cannot hold a language model of type 'gpt_neox'"),
        ({"granularities": [4, 16]}, "llava-next", "the finest level 16, as it always uses 64 tokens per crop"),
    ],
)
def test_models_that_a_layout_cannot_hold_are_refused(tmp_path, fields, target, message):
    tiny_model(**fields).save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=message):
        plan_conversion(tmp_path / "own", target)


def test_adapters_are_merged(tmp_path, own):
    name = "model.language_model.layers.0.self_attn.q_proj"
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(own), "r": 2, "lora_alpha": 4}
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    save_file(
        {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    plan = plan_conversion(tmp_path / "lora", "llava-next")
    assert [fate.target for fate in plan.fates if "adapters merged" in fate.note] == [
        "language_model.model.layers.0.self_attn.q_proj.weight"
    ]
    assert convert(plan, tmp_path / "next") <= 1e-6
    merged = load_model(tmp_path / "next").state_dict()[f"{name}.weight"]
    torch.testing.assert_close(merged, load_model(own).state_dict()[f"{name}.weight"] + 2 * up @ down)
    load(tmp_path / "next")
    before = {file.name: file.read_bytes() for file in (tmp_path / "lora").iterdir()}
    for output in (tmp_path / "lora", tmp_path, own):
        with pytest.raises(ValueError, match="contains the source"):
            convert(plan, output, overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "lora").iterdir()} == before
    base = tmp_path / "base"  # a merged weight is not in the output as it is in the file
    shutil.copytree(own, base)
    (base / MANIFEST_NAME).write_text(json.dumps({"weights": compute_checksums(base)}))
    change(base / "model.safetensors", f"{name}.weight", lambda weight: weight + 1)
    edit(tmp_path / "lora" / "adapter_config.json", base_model_name_or_path=str(base))
    with pytest.raises(CheckpointError, match=rf"{name}.weight differs from its checksum"):
        run(tmp_path / "lora", tmp_path / "damaged", "avg")


def test_pickled_weights_are_converted_too(tmp_path):
    shutil.copytree(HF45, tmp_path / "pickled")
    for file in (*(tmp_path / "pickled").glob("*.safetensors"), tmp_path / "pickled" / INDEX_NAME):
        file.unlink()
    torch.save(read_tensors(HF45), tmp_path / "pickled" / "pytorch_model.bin")
    run(tmp_path / "pickled", tmp_path / "next", "llava-next")
    assert fingerprint(stored_tensors(tmp_path / "next")) == fingerprint(stored_tensors(HF45))


def test_a_manifest_goes_along_with_new_checksums_if_the_weights_are_those_of_the_old_ones(tmp_path, own):
    stage = tmp_path / "stage2"
    shutil.copytree(own, stage)
    checksums = compute_checksums(stage)
    manifest = {"stage": 2, "finished": True, "weights": checksums}
    (stage / MANIFEST_NAME).write_text(json.dumps(manifest))
    plan = plan_conversion(stage, "avg", max_shard_bytes=100_000)
    convert(plan, tmp_path / "sharded", check=False)
    written = json.loads((tmp_path / "sharded" / MANIFEST_NAME).read_text())
    assert (written["stage"], written["finished"]) == (2, True)
    assert written["weights"] == compute_checksums(tmp_path / "sharded")
    load_model(tmp_path / "sharded")
    run(stage, tmp_path / "next", "llava-next")
    assert not (tmp_path / "next" / MANIFEST_NAME).exists()
    with (stage / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x3c")
    for target in ("avg", "original", "llava-next"):
        with pytest.raises(CheckpointError, match="differs from its checksum"):
            run(stage, tmp_path / "changed", target)
        assert not list((tmp_path / "changed").iterdir())


def test_another_data_type_is_the_only_change_of_values(tmp_path, own):
    convert(plan_conversion(own, "avg", torch.bfloat16), tmp_path / "half")
    assert config_of(tmp_path / "half")["dtype"] == "bfloat16"
    half, whole = load_model(tmp_path / "half").state_dict(), load_model(own).state_dict()
    assert all(torch.equal(half[name], whole[name].to(torch.bfloat16)) for name in whole)


PROJECTOR = "model.multi_modal_projector.linear_1.weight"


@pytest.mark.parametrize("check", [True, False])
def test_values_that_do_not_fit_in_the_data_type_are_refused(tmp_path, own, check):
    shutil.copytree(own, tmp_path / "large")
    change(tmp_path / "large" / "model.safetensors", PROJECTOR, lambda weight: torch.full_like(weight, 1e6))
    number = stored_tensors(own)[PROJECTOR].num_bytes // 4
    with pytest.raises(CheckpointError, match=rf"{PROJECTOR}: {number} values are too large for float16"):
        convert(plan_conversion(tmp_path / "large", "avg", torch.float16), tmp_path / "half", check=check)
    assert not list((tmp_path / "half").iterdir())


def test_logits_that_are_not_finite_are_no_agreement(tmp_path, own):
    shutil.copytree(own, tmp_path / "nan")
    change(tmp_path / "nan" / "model.safetensors", "lm_head.weight", lambda weight: weight * torch.nan)
    with pytest.raises(CheckpointError, match="gives logits that are NaN or infinite, so the output is not written"):
        run(tmp_path / "nan", tmp_path / "output", "llava-next", check=True)
    assert not list((tmp_path / "output").iterdir())


def test_damaged_weights_are_refused_with_a_cast_and_without_check(tmp_path, own):
    stage, pickled = tmp_path / "stage", tmp_path / "pickled"
    shutil.copytree(own, stage)
    (stage / MANIFEST_NAME).write_text(json.dumps({"stage": 2, "weights": compute_checksums(stage)}))
    shutil.copytree(own, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(read_tensors(own), pickled / "pytorch_model.bin")
    embeddings = stored_tensors(pickled)["model.language_model.embed_tokens.weight"]
    change(stage / "model.safetensors", embeddings.name, lambda weight: weight + 1)
    with (pickled / "pytorch_model.bin").open("r+b") as file:
        file.seek(embeddings.start + 3)
        file.write(b"\x3c")
    for source in (stage, pickled):
        for target in ("avg", "llava-next"):  # the latter adds rows to the embeddings
            with pytest.raises(CheckpointError, match=rf"tensor {embeddings.name} differs from its checksum"):
                convert(plan_conversion(source, target, torch.bfloat16), tmp_path / "output", check=False)
            assert not list((tmp_path / "output").iterdir())


def test_files_are_those_of_the_library(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b.weight": torch.randn(3, 5, generator=generator).bfloat16(),
        "a": torch.randn(7, generator=generator),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    planned = [
        PlannedTensor(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: [tensor.reshape(-1)])
        for name, tensor in tensors.items()
    ]
    write_shards(tmp_path, split_shards(planned, 10**9))
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_shards_hold_at_most_their_size_unless_a_weight_is_larger(tmp_path):
    sizes = [40, 30, 30, 200, 10]
    planned = [PlannedTensor(str(i), torch.uint8, (size,), list) for i, size in enumerate(sizes)]
    shards = split_shards(planned, 70)
    assert [[tensor.num_bytes for tensor in shard] for shard in shards.values()] == [[40, 30], [30], [200], [10]]
    assert next(iter(shards)) == "model-00001-of-00004.safetensors"


def test_a_new_output_leaves_no_shard_of_the_old_one_and_no_file_of_the_user_is_touched(tmp_path, own):
    output = tmp_path / "output"
    convert(plan_conversion(HF45, "llava-next", max_shard_bytes=100_000), output)
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 2
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder; name another one, or pass --overwrite"):
        run(own, output, "avg")
    run(own, output, "avg", overwrite=True)
    assert {file.name for file in output.glob("*.safetensors")} == {"model.safetensors"}
    assert not (output / INDEX_NAME).exists()
    assert not (output / "preprocessor_config.json").exists()
    assert (output / "notes.txt").read_text() == "mine"
    assert fingerprint(stored_tensors(output)) == fingerprint(stored_tensors(own))
    load(output)


def test_files_of_the_user_beside_the_vision_tower_stay(tmp_path):
    output = tmp_path / "output"
    run(RELEASED, output, "original")
    (output / "vision_tower" / "notes.txt").write_text("mine")
    (output / "vision_tower" / "model.safetensors").write_bytes(b"")
    run(RELEASED, output, "original", overwrite=True)
    assert (output / "vision_tower" / "notes.txt").read_text() == "mine"
    CLIPVisionModel.from_pretrained(output / "vision_tower")


def test_links_in_the_place_of_folders_are_named_and_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    output = tmp_path / "output"
    output.symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="output exists and is not a folder"):
        run(RELEASED, output, "original")
    output.unlink()
    run(RELEASED, output, "original")
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    for name in (".new", "vision_tower"):
        shutil.rmtree(output / name, ignore_errors=True)
        (output / name).symlink_to(tmp_path / "mine")
        with pytest.raises(ValueError, match=rf"{name} is not a folder.*: remove it"):
            run(RELEASED, output, "original", overwrite=True)
        (output / name).unlink()
        assert not list((tmp_path / "mine").iterdir())
    assert all(file.read_bytes() == before[file] for file in output.iterdir() if file.is_file())


def test_an_output_with_other_logits_is_not_written(tmp_path, own, monkeypatch):
    output = tmp_path / "output"
    run(HF45, output, "llava-next")
    before = {file: file.read_bytes() for file in output.iterdir()}
    monkeypatch.setattr(same_logits, "TOLERANCE", -1.0)
    with pytest.raises(CheckpointError, match="gives other logits"):
        run(own, output, "avg", check=True, overwrite=True)
    assert {file: file.read_bytes() for file in output.iterdir()} == before


def test_the_source_is_not_overwritten(tmp_path, own):
    shutil.copytree(own, tmp_path / "model")
    with pytest.raises(ValueError, match="contains the source"):
        run(tmp_path / "model", tmp_path / "model", "llava-next", overwrite=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors"),
        (lambda folder: truncate(folder / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors"),
        (lambda folder: edit(folder / "config.json", hidden_size=32), "shape "),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=3), "missing "),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_damaged_sources_end_in_one_line(tmp_path, capsys, damage, message):
    source = tmp_path / "source"
    shutil.copytree(LLAVA16, source)
    damage(source)
    assert cli.main(["convert", str(source), str(tmp_path / "output")]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("avg-llava:")]) == len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "output").exists()


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def change(file, name, to):
    """Changes one tensor of a file."""
    tensors = load_file(file)
    save_file(tensors | {name: to(tensors[name])}, file, metadata={"format": "pt"})


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("renaming", [ORIGINAL_KEYS, TRANSFORMERS_KEYS], ids=["original", "transformers"])
def test_renamings_are_invertible(renaming):
    names = {name: name for name in open_checkpoint(RELEASED).stored()}
    there = rename_keys(names, invert(renaming))
    assert len(there) == len(names)
    assert set(rename_keys(there, renaming)) == set(names)


MEASURE = """
import sys
from pathlib import Path
from avg_llava.checkpoints.convert import convert, plan_conversion

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

source, output = Path(sys.argv[1]), Path(sys.argv[2])
limit = 20_000_000
plan_conversion(source, "llava-next", max_shard_bytes=limit)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
plan = plan_conversion(source, "llava-next", max_shard_bytes=limit)
convert(plan, output, check=False)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_peak_memory_is_below_one_and_a_half_shards(tmp_path):
    from avg_llava.checkpoints.loading import build_from_backbones
    from avg_llava.model.processing import AvgLlavaProcessor
    from tests.tiny import bpe_tokenizer, language_config, vision_config, write_backbones

    language = language_config(bpe_tokenizer(), vocab_size=16_001, hidden_size=512, intermediate_size=1024)
    write_backbones(tmp_path, vision_config(patch_size=8), language, bpe_tokenizer())
    model = build_from_backbones(tmp_path / "vision", tmp_path / "language", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="20MB")
    processor = AvgLlavaProcessor.from_backbones(tmp_path / "vision", tmp_path / "language", model.config)
    processor.save_pretrained(tmp_path / "model")
    del model
    words = [sys.executable, "-c", MEASURE, tmp_path / "model", tmp_path / "output"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    largest = max(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert len(list((tmp_path / "output").glob("*.safetensors"))) > 1
    assert int(done.stdout) < 1.5 * largest
