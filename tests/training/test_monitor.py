"""Metrics of the log, against independent counts."""

import json
import logging
import socket
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState
from transformers.models.llama.modeling_llama import LlamaModel

from avg_llava import AvgLlavaConfig
from avg_llava.bench.presets import PRESETS
from avg_llava.bench.training import make_batch, sample_shapes
from avg_llava.common.machine import known_peak
from avg_llava.training import monitor, run
from avg_llava.training.assembly import build_dataset, load_processor
from avg_llava.training.config import ConfigError, TrainConfig, load_config
from avg_llava.training.flops import step_flops
from avg_llava.training.monitor import (
    COLLAPSE_LINES,
    COLLAPSE_SHARE,
    MACHINE_METRICS,
    CollapseAlarm,
    Monitor,
    weighted_means,
)
from avg_llava.training.stages import STAGES, part_of
from avg_llava.training.trainer import StageTrainer
from tests.tiny import forget_checksums, stage_values, write_backbones, write_data

pytestmark = pytest.mark.xdist_group("monitor")  # stage 1's result is shared


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Data in two sources, with text-only samples and one of two images; stage 1's result."""
    folder = tmp_path_factory.mktemp("world")
    write_backbones(folder)
    write_data(folder, num_samples=12, num_text_only=4)
    records = json.loads((folder / "instruct.json").read_text())
    (folder / "colours.json").write_text(json.dumps(records[:6]))
    (folder / "other.json").write_text(json.dumps(records[6:]))
    values = stage_values(1, folder, folder)
    values["model"]["router"]["dropout"] = 0.0
    (folder / "stage1.yaml").write_text(yaml.safe_dump(values))
    run.run_stage(load_config(folder / "stage1.yaml", ["--optim.max_steps", "1"]))
    return folder


def _config(stage: int, world: Path, folder: Path, *overrides: str) -> TrainConfig:
    """Configuration of a run of any stage that starts from stage 1's result."""
    values = stage_values(stage, folder, world)
    if stage > 1:
        values["model"] = {"start": str(world / "stage1"), "force_start": True}
        values["data"]["sources"] = [{"path": str(world / "colours.json")}, {"path": str(world / "other.json")}]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(path, ["--output.dir", str(folder / "run"), *overrides])


def _log(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "run" / "log_history.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def _monitor(config: TrainConfig, model_config: AvgLlavaConfig | None = None) -> Monitor:
    processor, own_config = load_processor(config)
    model_config = model_config or own_config
    return Monitor(config, model_config, {}, build_dataset(config, processor, own_config), torch.device("cpu"))


@pytest.mark.parametrize("stage", STAGES)
def test_tokens_are_those_that_the_language_model_sees(stage, world, tmp_path, monkeypatch):
    """A line counts all steps since the last: of steps 1, 2 and 3, and 4 and 5, each of two micro-batches."""
    seen = [0]
    forward = LlamaModel.forward

    def counting(model, *arguments, **inputs):
        seen[-1] += inputs["inputs_embeds"].shape[:2].numel()
        return forward(model, *arguments, **inputs)

    def log(trainer, logs, *arguments):
        seen.append(0)
        log_line(trainer, logs, *arguments)

    log_line = StageTrainer.log
    monkeypatch.setattr(LlamaModel, "forward", counting)
    monkeypatch.setattr(StageTrainer, "log", log)
    run.run_stage(_config(stage, world, tmp_path, "--optim.max_steps", "4", "--logging.every", "2"))
    lines = _log(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert [line["tokens"] for line in lines] == seen[:3]
    assert all(line["tokens_per_second"] > 0 for line in lines)


def test_gradient_norms_of_the_parts(world, tmp_path, monkeypatch):
    """Against autograd's gradients before clipping."""
    expected: list[dict[str, torch.Tensor]] = []
    clip = StageTrainer._clip_grad_norm

    def look(trainer, model):
        squares: dict[str, torch.Tensor] = {}
        for name, parameter in trainer.model.model.named_parameters():
            if parameter.grad is not None:
                part = part_of(name)
                squares[part] = squares.get(part, torch.zeros(())) + parameter.grad.square().sum()
        expected.append(squares)
        return clip(trainer, model)

    monkeypatch.setattr(StageTrainer, "_clip_grad_norm", look)
    settings = ("--optim.max_grad_norm", "0.01", "--optim.weight_decay", "0.1", "--logging.every", "2")
    run.run_stage(_config(3, world, tmp_path, *settings))
    lines = _log(tmp_path)
    for line in lines:
        squares = expected[line["step"] - 1]
        assert set(squares) == set(STAGES[3].trains)
        for part, square in squares.items():
            assert line[f"grad_norm_{part}"] == pytest.approx(square.sqrt().item(), rel=1e-4), part
        assert line["grad_norm"] == pytest.approx(sum(squares.values()).sqrt().item(), rel=1e-4)
        assert line["grad_norm"] > 0.01, "clipped"


def test_operations_and_what_a_device_could_do(world, tmp_path):
    model_config = PRESETS["mini"].config()
    samples = sample_shapes(2, model_config)
    watched = _monitor(_config(2, world, tmp_path, "--logging.peak_tflops", "0.5"), model_config)
    list(watched.waiting_for(iter([{}])))
    watched.count([make_batch(samples, model_config, torch.device("cpu"))] * 2)
    record = watched.take()
    assert record.flops == pytest.approx(
        2 * step_flops(STAGES[2].trains, STAGES[2].passes, samples, model_config).total
    )
    assert record.samples == 2 * len(samples)
    line = watched.line([record._replace(seconds=2.0), record._replace(seconds=1.5)], grad_norm=None)
    assert line["tflops"] == pytest.approx(record.flops / 2 / 1e12), "of one of two devices"
    assert line["mfu"] == pytest.approx(line["tflops"] / 0.5)
    assert line["samples_per_second"] == 2 * record.samples / 2
    unknown = _monitor(_config(2, world, tmp_path), model_config)
    assert "mfu" not in unknown.line([record], grad_norm=None), "nobody said what this CPU could do"


def test_known_peak_is_of_the_exact_device():
    assert known_peak("NVIDIA H100 80GB HBM3", "bf16", tf32=True) == 989e12
    assert known_peak("NVIDIA A100-SXM4-40GB", "bf16", tf32=True) == 312e12
    assert known_peak("NVIDIA H100 80GB HBM3", "fp32", tf32=True) == 494e12
    assert known_peak("NVIDIA H100 80GB HBM3", "fp32", tf32=False) == 67e12
    assert known_peak("NVIDIA H100 PCIe", "bf16", tf32=True) is None, "slower than the one above"


def test_peak_must_be_a_speed(world, tmp_path):
    with pytest.raises(ConfigError, match=r"logging\.peak_tflops must be above 0"):
        _config(2, world, tmp_path, "--logging.peak_tflops", "0")


def test_waiting_for_data(world, tmp_path, monkeypatch):
    """With a fake clock: two batches that take 3 s each, steps of 1 s, a checkpoint of 10 s."""
    now = [100.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])

    def load():
        for _ in range(2):
            now[0] += 3
            yield {}

    watched = _monitor(_config(2, world, tmp_path))
    for _ in watched.waiting_for(load()):
        now[0] += 1
    with watched.paused():
        now[0] += 10
    record = watched.take()
    assert (record.waited, record.seconds) == (6.0, 8.0)
    other = record._replace(waited=2.0)
    assert watched.line([other, record], grad_norm=None)["data_wait_share"] == 0.75, "of the process that waits most"
    now[0] += 5
    assert watched.take().seconds == 5, "since the last line"


def test_levels_of_each_source(world, tmp_path):
    """Random choices of two processes, counted by hand."""
    config = _config(4, world, tmp_path)
    watched, levels = [_monitor(config), _monitor(config)], [4, 8, 16, 32, 64]
    dataset = watched[0].dataset
    assert dataset.source_names == ["colours", "other"]
    generator, counts = torch.Generator().manual_seed(0), Counter()
    for number in range(6):
        indices = torch.randint(len(dataset), (3,), generator=generator).tolist()
        owners = torch.tensor([0, 2, 2])
        chosen = torch.randint(5, (3,), generator=generator)
        outputs = {"metrics": {}, "num_items": 3, "owners": owners, "chosen": chosen}
        watched[number % 2].add(outputs, indices)
        for owner, level in zip(owners.tolist(), chosen.tolist(), strict=True):
            counts["colours" if indices[owner] < 6 else "other", levels[level]] += 1
    for each in watched:
        list(each.waiting_for(iter([{}])))
    line = watched[0].line([each.take() for each in watched], grad_norm=None)
    for source in ("colours", "other"):
        total = sum(counts[source, level] for level in levels)
        assert total > 0
        for level in levels:
            assert line[f"share_{level}/{source}"] == pytest.approx(counts[source, level] / total)
    assert not watched[0].take().choices, "a line starts anew"


def test_shares_of_the_sources_make_up_the_shares(world, tmp_path):
    run.run_stage(_config(4, world, tmp_path))
    line = _log(tmp_path)[0]
    for level in (4, 8, 16, 32, 64):
        parts = [line.get(f"share_{level}/{source}", 0.0) for source in ("colours", "other")]
        assert min(parts) - 1e-6 <= line[f"share_{level}"] <= max(parts) + 1e-6
    assert {"router_regret", "router_agreement", "router_entropy", "grad_norm_router"} <= line.keys()
    assert line["router_regret"] >= 0


def test_machine_metrics_are_all_there(world, tmp_path):
    run.run_stage(_config(2, world, tmp_path, "--logging.peak_tflops", "1"))
    for line in _log(tmp_path):
        assert set(MACHINE_METRICS) <= line.keys()
        assert 0 <= line["data_wait_share"] <= 1
        assert 0 < line["mfu"] < 1
        assert 0.05 < line["memory_gib"] < 100


class TestCollapse:
    def _train(self, world: Path, folder: Path, level: int | None, caplog) -> list[str]:
        """Warnings in 22 steps of stage 4, with a router that always prefers one level, or with an unchanged one."""
        start = folder / "start"
        start.mkdir()
        for file in (world / "stage1").iterdir():
            if file.is_file():
                (start / file.name).write_bytes(file.read_bytes())
        if level is not None:
            weights = load_file(start / "model.safetensors")
            weights["model.router.norm.weight"] = torch.zeros(5)
            weights["model.router.norm.bias"] = torch.eye(5)[level]
            save_file(weights, start / "model.safetensors", {"format": "pt"})
            forget_checksums(start)
        settings = ["--model.start", str(start), "--optim.max_steps", "22", "--optim.lr", "1e-6"]
        settings += ["--data.sources", f"[{{path: {world / 'colours.json'}}}]", "--optim.global_batch_size", "2"]
        with caplog.at_level(logging.WARNING, logger="avg_llava"):
            run.run_stage(_config(4, world, folder, *settings))
        return [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]

    def test_a_router_that_collapses(self, world, tmp_path, caplog):
        (message,) = self._train(world, tmp_path, 3, caplog)
        assert message.startswith(f"step {COLLAPSE_LINES}: the router has collapsed: level 32 for 100.0% of the images")
        agreement = sum(line["router_agreement"] for line in _log(tmp_path)[:COLLAPSE_LINES]) / COLLAPSE_LINES
        assert f"feedback prefers for {agreement:.0%}" in message
        assert "optim.lr" in message

    def test_a_router_that_does_not(self, world, tmp_path, caplog):
        assert self._train(world, tmp_path, None, caplog) == []
        shares = [max(line[f"share_{level}"] for level in (4, 8, 16, 32, 64)) for line in _log(tmp_path)]
        assert sum(shares) / len(shares) < COLLAPSE_SHARE

    def test_once_until_it_chooses_otherwise(self, caplog):
        alarm = CollapseAlarm()

        def log(share: float, times: int, rank_zero: bool = True) -> list[str]:
            caplog.clear()
            for _ in range(times):
                line = {"share_36": share, "share_72": 1 - share, "share_72/one source": 1.0}
                state = TrainerState(is_world_process_zero=rank_zero, global_step=7, log_history=[line])
                alarm.on_log(None, state, TrainerControl())
            return [record.getMessage() for record in caplog.records]

        assert log(1.0, COLLAPSE_LINES - 1) == []
        assert log(1.0, 1, rank_zero=False) == []
        (message,) = log(1.0, 10)
        assert "level 36 for 100.0%" in message
        assert "feedback" not in message, "of an objective without feedback"
        assert log(0.5, COLLAPSE_LINES) == []
        assert len(log(0.0, COLLAPSE_LINES + 10)) == 1


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_trackers_without_a_network(tracker, world, tmp_path, monkeypatch):
    """Trackers write files, and the process opens no connection to another machine."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo
    asked = []

    def watched_connect(connection, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            asked.append(address)
        return connect(connection, address)

    def watched_resolve(host, *arguments, **settings):
        if host not in ("127.0.0.1", "::1", "localhost", None):
            asked.append(host)
        return resolve(host, *arguments, **settings)

    monkeypatch.setattr(socket.socket, "connect", watched_connect)
    monkeypatch.setattr(socket, "getaddrinfo", watched_resolve)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run.run_stage(_config(4, world, tmp_path, "--optim.max_steps", "2", "--logging.trackers", f"[{tracker}]"))
    assert asked == []
    (file,) = (tmp_path / "run").glob(
        {"wandb": "wandb/offline-run-*/*.wandb", "trackio": "trackio/avg-llava.db"}[tracker]
    )
    assert b"router_regret" in file.read_bytes()


def test_metrics_are_weighted_by_what_they_are_means_of():
    records = [{"a": (2.0, 1), "b": (0.0, 0)}, {"a": (1.0, 3)}]
    assert weighted_means(records) == {"a": 0.75}
