"""Micro-batches are a matter of memory: however a step's samples are cut up, its gradient and loss are the same."""

from pathlib import Path

import pytest
import torch
import yaml

from avg_llava.training import run
from avg_llava.training.config import load_config
from avg_llava.training.monitor import MACHINE_METRICS
from tests.training.tiny_world import stage_values, write_backbones, write_data

SAMPLES = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Data with text-only samples, answers of different lengths and two images in a sample; stage 1's result."""
    folder = tmp_path_factory.mktemp("world")
    write_backbones(folder)
    write_data(folder, num_samples=9, num_text_only=3)
    values = stage_values(1, folder, folder)
    values["model"]["router"]["dropout"] = 0.0  # its masks would depend on the micro-batches
    (folder / "stage1.yaml").write_text(yaml.safe_dump(values))
    run.run_stage(load_config(folder / "stage1.yaml", ["--optim.max_steps", "1"]))
    return folder


def _train(stage: int, world: Path, folder: Path, micro_batch_size: int, monkeypatch) -> tuple[list, list[dict]]:
    """Gradients at each of two optimizer steps, and the lines of the log."""
    gradients: list[list[torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def record(optimizer, *args, **kwargs):
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        gradients.append([value.grad.clone() for value in parameters if value.grad is not None])
        return step(optimizer, *args, **kwargs)

    values = stage_values(stage, folder, world)
    values["model"] = values["model"] if stage == 1 else {"start": str(world / "stage1"), "force_start": True}
    values["data"]["group_by_modality_length"] = False
    values["optim"] |= {"global_batch_size": SAMPLES, "micro_batch_size": micro_batch_size, "max_steps": 2}
    values["output"] = {"dir": str(folder / f"{stage}-{micro_batch_size}")}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record)
        run.run_stage(load_config(path))
    log = (folder / f"{stage}-{micro_batch_size}" / "log_history.jsonl").read_text().splitlines()
    return gradients, [line for line in map(yaml.safe_load, log) if "loss" in line]


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_one_by_eight_is_eight_by_one(world, tmp_path, stage, monkeypatch):
    runs = {size: _train(stage, world, tmp_path, size, monkeypatch) for size in (8, 1)}
    expected_gradients, expected_log = runs.pop(8)
    assert len(expected_gradients) == len(expected_log) == 2
    for gradients, log in runs.values():
        for found, expected in zip(gradients, expected_gradients, strict=True):
            norm = torch.stack([gradient.norm() for gradient in expected]).norm()
            distance = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
            assert distance <= 1e-5 * norm
        for line, expected in zip(log, expected_log, strict=True):
            assert line.keys() == expected.keys()
            for name in line.keys() - {"epoch", *MACHINE_METRICS}:
                assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
