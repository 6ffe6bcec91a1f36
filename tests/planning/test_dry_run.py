"""The dry run finds all problems at once and leaves no files behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from avg_llava import cli
from avg_llava.data.index import INDEX_DIR_NAME
from avg_llava.planning import dry_run
from avg_llava.training import run
from avg_llava.training.assembly import load_processor
from avg_llava.training.config import load_config
from tests.tiny import make_checkpoint, stage_values, write_backbones, write_data


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_backbones(folder)
    write_data(folder, num_samples=8)
    make_checkpoint(folder / "tiny")
    return folder


@pytest.fixture
def world(source, tmp_path) -> Path:
    shutil.copytree(source, tmp_path / "world")
    return tmp_path / "world"


def _write(world: Path, stage: int, **sections) -> Path:
    values = stage_values(stage, world.parent / "runs" / "deep", world)
    for name, section in sections.items():
        values[name] |= section
    path = world.parent / f"stage{stage}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _files(folder: Path) -> set[Path]:
    """All files except data indices."""
    return {path.relative_to(folder) for path in folder.rglob("*") if INDEX_DIR_NAME not in path.parts}


def test_a_run_that_is_right(world, capsys):
    path = _write(world, 1)
    before = _files(world.parent)
    assert cli.main(["train", str(path), "--optim.lr", "1e-3", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "dry run: no problems" in output
    assert "8 samples; of 8 checked 0 cannot be read" in output
    assert "names and shapes fit" in output
    assert _files(world.parent) == before, "not even the folders above output.dir"


def test_the_training_entry_point_names_the_dry_run(capsys):
    assert run.main(["stage1.yaml", "--optim.lr", "1e-3", "--dry-run"]) == 2
    assert "python -m avg_llava.planning.dry_run stage1.yaml --optim.lr 1e-3`" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["--dry-run"], 2)])
def test_usage(capsys, arguments, code):
    assert dry_run.main(arguments) == code
    out, err = capsys.readouterr()
    assert "usage: python -m avg_llava.planning.dry_run CONFIG" in (err if code else out)


def test_a_token_budget_is_told(world, capsys):
    path = _write(world, 1, optim={"global_batch_size": 8, "micro_batch_size": 2, "max_tokens_per_batch": 1200})
    before = _files(world.parent)
    assert cli.main(["train", str(path), "--dry-run"]) == 0
    assert "as many per step as fit in 4 micro-batches of up to 1,200 tokens per process" in capsys.readouterr().out
    assert _files(world.parent) == before, "the samples are not counted yet"


def test_what_is_in_the_output_folder_stays(world):
    path = _write(world, 1)
    kept = world.parent / "runs/deep/stage1/notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    before = _files(world.parent)
    assert dry_run.dry_run(path).problems == []
    assert _files(world.parent) == before


def test_every_problem_is_named(world, monkeypatch):
    (world / "images/3.png").write_bytes((world / "images/3.png").read_bytes()[:90])
    records = json.loads((world / "captions.json").read_text())
    records[5]["conversations"].append({"from": "gpt", "value": "again"})
    (world / "captions.json").write_text(json.dumps(records))
    weights = load_file(world / "vision/model.safetensors")
    name = next(key for key in weights if key.endswith("layers.0.mlp.fc1.weight"))
    weights[name] = torch.zeros(5, 5)
    save_file(weights, world / "vision/model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 99, 1))
    absent = {"sources": [{"path": str(world / "captions.json")}, {"path": str(world / "absent.json")}]}
    path = _write(world, 1, optim={"global_batch_size": 5}, runtime={"deepspeed": "none.json"}, data=absent)
    before = _files(world.parent)
    problems = "\n".join(dry_run.dry_run(path).problems)
    for part in (
        "global_batch_size 5 is not a multiple",
        "cannot read none.json",
        "(5, 5) in the checkpoint",
        "images/3.png",
        "sample 'caption-5'",
        "absent.json",
        "1 are free",
    ):
        assert part in problems, problems
    assert len(problems.splitlines()) >= 7
    assert _files(world.parent) == before


@pytest.mark.parametrize("stage", [2, 4])
def test_later_stages(world, stage):
    start = {"model": {"start": str(world / "tiny/model"), "force_start": True}}
    path = _write(world, stage, **start)
    report = dry_run.dry_run(path)
    assert report.problems == []
    report = dry_run.dry_run(path, ["--model.force_start", "false"])
    assert len(report.problems) == 1
    assert "has no stage.json" in report.problems[0]


def test_the_weights_are_not_read(world):
    """Only the header of a weight file is read."""
    path = _write(world, 2, model={"start": str(world / "tiny/model"), "force_start": True})
    config = load_config(path)
    _, model_config = load_processor(config)
    file = world / "tiny/model/model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    assert dry_run.check_weights(config, model_config) > 0
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    report = dry_run.dry_run(path)
    assert any("missing    lm_head.weight" in problem for problem in report.problems)


def test_a_template_that_masks_everything(world):
    path = _write(world, 1, model={"max_length": 10})
    report = dry_run.dry_run(path)
    assert any("none of the checked samples has supervised tokens" in problem for problem in report.problems)


def test_a_configuration_that_cannot_be_read(world, capsys):
    path = _write(world, 1)
    assert cli.main(["train", str(path), "--optim.lrr", "1", "--dry-run"]) == 1
    assert "did you mean 'lr'" in capsys.readouterr().err


def test_room_for_checkpoints(world):
    """Worked out by hand: float32 weights, and two moments of trained parameters."""
    config = load_config(_write(world, 1, output={"save_every": 2, "keep": 2}))
    _, model_config = load_processor(config)
    model = dry_run.meta_model(config, model_config)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 0 < trained < total
    assert dry_run.bytes_to_write(config, model_config) == 4 * total + 3 * (4 * total + 8 * trained)


def test_only_the_first_process_looks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert dry_run.main(["absent.yaml"]) == 0
    assert capsys.readouterr().out == ""


def test_data_and_disk_are_looked_at_although_the_start_is_not_there(world, monkeypatch):
    """The shape of the start comes from configurations in the same folder."""
    (world / "images/2.png").write_bytes(b"")
    _write(world, 1)
    path = _write(world, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 99, 1))
    report = dry_run.dry_run(path)
    problems = "\n".join(report.problems)
    for part in ("start: stage 2 starts from a finished stage 1", "model: ", "images/2.png", "1 are free"):
        assert part in problems
    assert any("stage1.yaml" in fact for fact in report.facts)
    assert not (world.parent / "runs").exists()
