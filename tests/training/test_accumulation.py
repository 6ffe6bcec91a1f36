"""Gradient and loss of a step do not depend on how its samples are divided into micro-batches."""

from pathlib import Path

import pytest
import torch
import yaml

from avg_llava.training import run
from avg_llava.training.config import load_config
from avg_llava.training.monitor import MACHINE_METRICS
from avg_llava.training.objectives import objective_class
from avg_llava.training.stages import STAGES
from tests.tiny import stage_values, write_backbones, write_data

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


def _train(stage: int, world: Path, folder: Path, optim: dict, monkeypatch) -> tuple[list, list[dict]]:
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
    values["optim"] |= {**optim, "max_steps": 2}
    values["output"] = {"dir": str(folder / "-".join(map(str, (stage, *optim.values()))))}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record)
        run.run_stage(load_config(path))
    log = (Path(values["output"]["dir"]) / "log_history.jsonl").read_text().splitlines()
    return gradients, [line for line in map(yaml.safe_load, log) if "loss" in line]


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_one_by_eight_is_eight_by_one(world, tmp_path, stage, monkeypatch):
    runs = [
        _train(stage, world, tmp_path, {"global_batch_size": SAMPLES, "micro_batch_size": size}, monkeypatch)
        for size in (8, 1)
    ]
    _compare(*runs)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_token_budget_changes_no_gradient(world, tmp_path, stage, monkeypatch):
    """All samples in one step: as one micro-batch, and as several micro-batches under a token budget."""
    samples = 9 if stage == 1 else 12
    sizes: list[list[int]] = []
    forward = objective_class(STAGES[stage].objective).forward

    def count(objective, *arguments, **inputs):
        sizes[-1].append(len(inputs["input_ids"]))
        return forward(objective, *arguments, **inputs)

    monkeypatch.setattr(objective_class(STAGES[stage].objective), "forward", count)
    runs = []
    for micro_batch_size, budget in ((samples, None), (1, 700)):
        sizes.append([])
        optim = {"global_batch_size": samples, "micro_batch_size": micro_batch_size, "max_tokens_per_batch": budget}
        runs.append(_train(stage, world, tmp_path, optim, monkeypatch))
    assert sizes[0] == [samples, samples]
    assert sum(sizes[1]) == 2 * samples
    assert 2 * 2 <= len(sizes[1]) < 2 * samples
    assert len(set(sizes[1])) > 1
    _compare(*runs)


def _compare(expected: tuple[list, list[dict]], found: tuple[list, list[dict]]) -> None:
    (expected_gradients, expected_log), (all_gradients, log) = expected, found
    assert len(expected_gradients) == len(expected_log) == 2
    for gradients, expected_step in zip(all_gradients, expected_gradients, strict=True):
        norm = torch.stack([gradient.norm() for gradient in expected_step]).norm()
        distance = torch.stack([(a - b).norm() for a, b in zip(gradients, expected_step, strict=True)]).norm()
        assert distance <= 1e-5 * norm
    for line, expected_line in zip(log, expected_log, strict=True):
        assert line.keys() == expected_line.keys()
        for name in line.keys() - {"epoch", *MACHINE_METRICS}:
            assert line[name] == pytest.approx(expected_line[name], rel=1e-4, abs=1e-6), name
