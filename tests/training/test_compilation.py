"""Compiled layers against eager ones, and the refusals of `runtime.compile`."""

import shutil

import pytest
import torch

from avg_llava.common.settings import ConfigError
from avg_llava.planning import dry_run
from avg_llava.training.assembly import check_compilation, compile_layers
from avg_llava.training.config import LoraSettings, ObjectiveSettings
from avg_llava.training.lora import add_adapters
from avg_llava.training.objectives import objective_class
from avg_llava.training.stages import STAGES, set_trainable
from tests.tiny import images, pad, prompt, tiny_model


def losses_and_gradients(compiled: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Stage 2 with LoRA and recomputed activations, on batches of different lengths."""
    model = tiny_model()
    add_adapters(model, LoraSettings(rank=4, dropout=0.0), seed=0)
    set_trainable(model, STAGES[2])
    model.activation_checkpointing_enable({"use_reentrant": False})
    names = list(model.state_dict())
    if compiled:
        compile_layers(model)
    assert list(model.state_dict()) == names
    objective = objective_class("instruction")(model, ObjectiveSettings()).train()
    losses = []
    for length in (20, 31, 27):
        ids = [prompt(length, 3, seed=length), prompt(14, seed=3)]
        output = objective(
            input_ids=pad(ids),
            attention_mask=pad([torch.ones_like(each) for each in ids]),
            labels=pad([torch.where(torch.arange(len(each)) < 10, -100, each) for each in ids], value=-100),
            **images(model.config, (60, length)),
        )
        output["loss"].backward()
        losses.append(output["loss"].item())
    return losses, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_layers_compute_the_same():
    (expected, gradients), (found, compiled) = losses_and_gradients(False), losses_and_gradients(True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"
    assert found == pytest.approx(expected, abs=1e-5)
    assert compiled.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_not_under_zero3():
    with pytest.raises(ConfigError, match=r"runtime\.compile: under ZeRO-3"):
        check_compilation({"zero_optimization": {"stage": 3}}, use_cpu=False)


def test_not_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler on a CPU"):
        check_compilation({"zero_optimization": {"stage": 2}}, use_cpu=True)
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    check_compilation(None, use_cpu=True)


def test_the_dry_run_says_so():
    report = dry_run.dry_run("configs/mini/stage3.yaml", ["--runtime.compile"])
    assert any(problem.startswith("compilation: runtime.compile: under ZeRO-3") for problem in report.problems)
