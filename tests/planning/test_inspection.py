"""Inspection of folders: what they are, what they can start, and everything that is wrong with them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from avg_llava import cli, load, load_model
from avg_llava.checkpoints.checksums import compute_checksums
from avg_llava.planning.inspection import inspect
from avg_llava.training.checkpoint import StageManifest, write_manifest
from tests.parity.golden import GOLDEN
from tests.tiny import make_checkpoint, write_data

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("own"))


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(DATA / "llava16_vicuna", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("folder", "layout", "behavior", "has_router"),
    [
        (DATA / "llava16_vicuna", "original", "paper", False),
        (DATA / "hf45_vicuna", "llava_next", "paper", False),
        (Path("avg_llava/mini/checkpoint"), "avg_llava", "paper", True),
    ],
)
def test_models_are_described(folder, layout, behavior, has_router):
    found = inspect(folder, scan=True)
    assert (found.kind, found.layout, found.behavior, found.has_router) == ("model", layout, behavior, has_router)
    assert found.problems == []
    parts = {part: number for part, number in found.parameters.items() if part != "total"}
    assert set(parts) == {"vision", "projector", "newline", "llm", *(["router"] if has_router else [])}
    assert sum(parts.values()) == found.parameters["total"] == sum(found.dtypes.values())
    assert found.granularities[-1] == (found.vision["crop_size"] // found.vision["patch_size"]) ** 2
    assert any(start.startswith("inference") for start in found.starts)
    assert {file["name"] for file in found.files} >= {"config.json"}


def test_the_released_model_has_a_router_and_no_tokenizer(capsys):
    assert cli.main(["inspect", str(GOLDEN / "checkpoint"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["behavior"], found["has_router"], found["granularities"]) == (
        "released",
        True,
        [36, 72, 144, 288, 576],
    )
    (problem,) = found["problems"]
    assert "tokenizer" in problem
    assert found["starts"] == []


def test_backbones_are_described():
    language, vision = inspect(DATA / "vicuna_bin"), inspect(DATA / "clip_bin")
    assert (language.kind, language.language["type"], language.language["vocabulary"]) == (
        "language model",
        "llama",
        1000,
    )
    assert language.starts == ["stage 1, as model.language"]
    assert (vision.kind, vision.vision["crop_size"]) == ("vision tower", 336)
    assert vision.starts == ["stage 1, as model.vision"]
    assert language.problems == vision.problems == []
    for found, part in ((language, "llm"), (vision, "vision")):
        assert set(found.parameters) == {part, "total"}
        assert found.parameters[part] == found.parameters["total"] == sum(found.dtypes.values())


def test_the_stage_says_what_comes_next(own, tmp_path):
    shutil.copytree(own, tmp_path / "stage2")
    manifest = StageManifest(2, True, 7, {"path": "runs/stage1", "stage": 1, "created": None}, "", {}, 1)
    write_manifest(tmp_path / "stage2", manifest)
    found = inspect(tmp_path / "stage2")
    assert (found.stage["stage"], found.stage["finished"], found.stage["parent"]["path"]) == (2, True, "runs/stage1")
    assert found.starts == ["stage 3", "inference at one level (--granularity), as it has no trained router"]


def test_a_published_model_starts_the_stages_that_it_is_ready_for(own):
    without_router = inspect(DATA / "llava16_vicuna")
    assert without_router.starts[0] == "stage 3 with --force-start"
    assert len(without_router.starts) == 2
    assert inspect(own).starts == [
        "stage 3 with --force-start", "stage 4 with --force-start", "inference routed, or at one level"
    ]  # fmt: skip


def test_all_problems_are_listed(copied):
    fields = json.loads((copied / "config.json").read_text()) | {"intermediate_size": 100, "num_hidden_layers": 3}
    (copied / "config.json").write_text(json.dumps(fields))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (copied / name).unlink()
    found = inspect(copied)
    kinds = [problem.split()[0] for problem in found.problems]
    assert kinds.count("shape") == 6  # gate, up and down of two layers
    assert kinds.count("missing") == 9  # of the third layer
    assert sum("tokenizer" in problem for problem in found.problems) == 1
    assert found.starts == []


def test_all_damaged_files_are_listed(copied):
    (copied / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (copied / "model-00002-of-00002.safetensors").unlink()
    found = inspect(copied)
    assert len(found.problems) == 2
    assert any("git-lfs" in problem and SHARD in problem for problem in found.problems)
    assert any("model-00002-of-00002.safetensors is missing" in problem for problem in found.problems)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "", "the tokenizer or the processor in .* cannot be read"),
        ("tokenizer.json", None, "holds no tokenizer, neither tokenizer.json"),
        ("stage.json", "{", "stage.json is not a stage manifest"),
    ],
)
def test_what_loading_refuses_is_a_problem(own, tmp_path, name, content, message):
    shutil.copytree(own, tmp_path / "model")
    if content is None:
        (tmp_path / "model" / name).unlink()
    else:
        (tmp_path / "model" / name).write_text(content)
    (problem,) = inspect(tmp_path / "model").problems
    assert re.search(message, problem)
    if name != "stage.json":  # of training
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "model")


def test_a_tokenizer_of_a_larger_vocabulary_is_a_problem(tmp_path):
    """That of the golden data has 512 tokens; its model comes without one."""
    released = tmp_path / "released"
    shutil.copytree(GOLDEN / "checkpoint", released)
    for file in (GOLDEN / "tokenizer_tiny").iterdir():
        shutil.copy(file, released)
    (problem,) = inspect(released).problems
    assert "gives ids up to 511, but the model embeds 320 tokens" in problem
    with pytest.raises(ValueError, match="do not belong together"):
        load(released)


def test_weights_of_another_kind_are_a_problem(copied):
    tensors = load_file(copied / SHARD)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, copied / SHARD)
    (problem,) = inspect(copied).problems
    assert f"{name} is of type torch.int8" in problem


def test_values_that_are_not_finite_are_counted_on_request(copied):
    tensors = load_file(copied / SHARD)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    save_file(tensors, copied / SHARD)
    assert inspect(copied).problems == []
    (problem,) = inspect(copied, scan=True).problems
    assert problem.endswith("3 values are not finite")


def test_other_folders_are_told_apart(tmp_path):
    write_data(tmp_path / "data")
    found = inspect(tmp_path / "data")
    assert (found.kind, len(found.starts)) == ("data", 2)
    (tmp_path / "zero" / "global_step7").mkdir(parents=True)
    found = inspect(tmp_path / "zero")
    assert found.kind == "deepspeed"
    assert "zero_to_fp32" in found.problems[0]
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    assert inspect(tmp_path / "run").kind == "run"
    (tmp_path / "empty").mkdir()
    assert "no config.json" in inspect(tmp_path / "empty").problems[0]
    torch.save(
        {f"model.mm_projector.{i}.{name}": torch.ones(2) for i in (0, 2) for name in ("weight", "bias")},
        tmp_path / "mm_projector.bin",
    )
    found = inspect(tmp_path / "mm_projector.bin")
    assert (found.kind, found.parameters["total"]) == ("projector", 8)
    with pytest.raises(ValueError, match="no such folder or file"):
        inspect(tmp_path / "absent")


def test_changed_weights_are_found_by_their_checksums_on_request(own, tmp_path):
    stage = tmp_path / "stage2"
    shutil.copytree(own, stage)
    write_manifest(stage, StageManifest(2, True, 7, {}, "", {}, 1, weights=compute_checksums(stage)))
    found = inspect(stage, scan=True)
    assert (found.has_checksums, found.problems) == (True, [])
    with (stage / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x3c")
    assert inspect(stage).problems == []
    (problem,) = inspect(stage, scan=True).problems
    assert "differs from its checksum in stage.json" in problem


def test_adapters_are_described_with_their_base_model(tmp_path, own):
    base = load_model(own)
    layer = "model.language_model.layers.0.self_attn.q_proj"
    width = base.config.text_config.hidden_size
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(own), "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    names = {"lora_A": torch.ones(2, width), "lora_B": torch.ones(width, 2)}
    save_file(
        {f"base_model.model.{layer}.{name}.weight": tensor for name, tensor in names.items()},
        tmp_path / "adapter_model.safetensors",
    )
    found = inspect(tmp_path)
    assert (found.kind, found.problems, found.behavior) == ("adapter", [], "paper")
    assert found.parameters["total"] == sum(parameter.numel() for parameter in base.parameters())
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in inspect(tmp_path).problems[0]
    assert inspect(tmp_path).starts == []


def test_the_text_names_the_facts(capsys, own):
    assert cli.main(["inspect", str(own)]) == 0
    text = capsys.readouterr().out
    for fact in (
        "kind              model",
        "behavior          paper",
        "levels            1, 2, 4, 8, 16",
        "model.safetensors",
    ):
        assert fact in text
