"""A full disk, simulated by the operating system's limit on file sizes."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from avg_llava.training import assembly, run
from avg_llava.training.checkpoint import SaveError, checkpoint_bytes, latest_checkpoint, read_manifest, writing
from avg_llava.training.config import load_config
from avg_llava.training.stages import STAGES, set_trainable
from tests.tiny import stage_values, write_backbones, write_data

pytestmark = pytest.mark.xdist_group("training-saving")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    """Stage 1, with a checkpoint after every step."""
    root = tmp_path_factory.mktemp("saving")
    write_backbones(root)
    write_data(root)
    values = stage_values(1, root, root)
    values["output"]["save_every"] = 1
    path = root / "stage1.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def whole(config_file) -> list[float]:
    """Losses of an uninterrupted run."""
    return losses(run.run_stage(load_config(config_file)))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log_history.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("victim", "at_step"), [("model.safetensors", 2), ("optimizer.pt", 2), ("model.safetensors", None)]
)
def test_the_disk_is_full(config_file, whole, tmp_path, monkeypatch, capsys, victim, at_step):
    """The run exits with one line, the earlier checkpoint is complete, and the same command continues from it."""
    output = tmp_path / "run"
    arguments = [str(config_file), "--output.dir", str(output)]
    name = "_save_checkpoint" if at_step else "save_stage"
    save = getattr(run.StageTrainer, name)

    def save_on_full_disk(trainer, *others):
        if at_step is not None and trainer.state.global_step < at_step:
            return save(trainer, *others)
        limit = (latest_checkpoint(output) / victim).stat().st_size - 1
        with files_of_at_most(limit):
            return save(trainer, *others)

    with monkeypatch.context() as patch:
        patch.setattr(run.StageTrainer, name, save_on_full_disk)
        assert run.main(arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    last = 1 if at_step else 3
    assert len(errors) == 1
    for part in (
        f"cannot write {output}",
        "bytes, and ",
        " are free",
        f"checkpoint-{last} is whole",
        "output.save_every",
    ):
        assert part in errors[0]
    assert read_manifest(output) is None
    assert latest_checkpoint(output) == output / f"checkpoint-{last}"

    assert run.main(arguments) == 0
    assert losses(output) == pytest.approx(whole, rel=1e-6)
    assert read_manifest(output).finished


def test_how_much_a_checkpoint_takes(config_file, whole, tmp_path):
    """The estimate against the files of a checkpoint, up to headers and small files."""
    config = load_config(config_file, ["--output.dir", str(tmp_path / "run")])
    model, _ = assembly.build_model(config)
    set_trainable(model, STAGES[1])
    folder = config_file.parent / "stage1"
    weights = (folder / "model.safetensors").stat().st_size
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert checkpoint_bytes(model, has_master_weights=False) == pytest.approx(weights + 8 * trained, rel=0.15)
    assert checkpoint_bytes(model, True) - checkpoint_bytes(model, False) == 4 * trained


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="a mistake in the program"), writing(tmp_path / "a", tmp_path, 1):
        raise RuntimeError("a mistake in the program")
    with pytest.raises(SaveError, match="there is no earlier checkpoint"), writing(tmp_path / "a", tmp_path, 1):
        (tmp_path / "none" / "file").write_text("")
