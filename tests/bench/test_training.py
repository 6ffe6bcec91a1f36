"""`avg-llava bench train`: both variants do the same work, and the result is consistent. No time is asserted."""

import json
import multiprocessing
import os

import pytest
import torch

from avg_llava import AvgLlavaForConditionalGeneration
from avg_llava.bench import training as bench
from avg_llava.bench.presets import PRESETS
from avg_llava.bench.training import make_batch, prepare_step, sample_shapes
from avg_llava.cli import main


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_both_variants_take_the_same_steps(stage):
    losses = {}
    for variant in bench.VARIANTS:
        step = prepare_step(stage, "mini", variant)
        losses[variant] = [step() for _ in range(3)]
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-4)
    assert len(set(losses["ours"])) == 3, "the optimizer moves"


def test_stored_feedback_gives_the_same_steps(tmp_path):
    bench._store_feedback(tmp_path, "mini")
    steps = {
        variant: prepare_step(4, "mini", variant, tmp_path if variant == "ours" else None) for variant in bench.VARIANTS
    }
    losses = {variant: [step() for _ in range(3)] for variant, step in steps.items()}
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-4)


def test_only_the_router_learns_from_stored_feedback(capsys):
    assert main(["bench", "train", "--stage", "3", "--preset", "mini", "--stored-feedback"]) == 1
    assert "only stage 4 learns from stored feedback, not stage 3" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_lengths_match_the_model(stage):
    config = PRESETS["mini"].config()
    model = AvgLlavaForConditionalGeneration(config)
    samples = sample_shapes(stage, config)
    batch = make_batch(samples, config, torch.device("cpu"))
    for level in config.granularities:
        with torch.no_grad():
            spliced, _ = model.prepare(**batch, granularity=level)
        assert spliced.attention_mask.sum(1).tolist() == [sample.length(level, config) for sample in samples]
    assert (batch["labels"] != -100).sum(1).tolist() == [sample.num_answer_tokens for sample in samples]
    lengths = {sample.length(config.granularities[-1], config) for sample in samples}
    assert len(lengths) == len(samples), "a batch of mixed sizes"


def test_command(capsys):
    assert main(["bench", "train", "--stage", "3", "--preset", "mini", "--repeats", "1", "--json"]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    ours, plain = result["ours"], result["plain"]
    assert result["speedup"] == pytest.approx(plain["seconds_per_step"] / ours["seconds_per_step"])
    assert result["memory_ratio"] == pytest.approx(ours["peak_memory_bytes"] / plain["peak_memory_bytes"])
    assert result["flop_bound_speedup"] == pytest.approx(plain["tflop_per_step"] / ours["tflop_per_step"])
    assert result["flop_bound_speedup"] > 1
    assert ours["samples_per_second"] == pytest.approx(2 / ours["seconds_per_step"])
    assert ours["tflop_per_step"] == pytest.approx(sum(ours["tflop_by_part"].values()))
    assert result["settings"]["model"]["language"] == [128, 4, 344, 4]
    assert result["machine"]["torch"] == torch.__version__
    text = "\n".join(bench.table_lines(result))
    assert f"speed-up {result['speedup']:.2f}x" in text


def test_nothing_but_json_goes_to_standard_output(capfd):
    """Libraries write log lines to standard output in the processes that the command starts."""
    arguments = ["--stage", "4", "--preset", "mini", "--stored-feedback", "--repeats", "1", "--json"]
    assert main(["bench", "train", *arguments]) == 0
    assert json.loads(capfd.readouterr().out)["stored_feedback"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_7b_preset_needs_a_gpu(capsys):
    assert main(["bench", "train", "--stage", "3", "--preset", "7b"]) == 1
    assert "needs a GPU; on a CPU, --preset proportioned" in capsys.readouterr().err


def test_a_process_that_ends_early_is_reported():
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=os._exit, args=(3,))
    process.start()
    theirs.close()
    with pytest.raises(ValueError, match="the process of the plain step ended with code 3: see its traceback above"):
        bench._request_step(connection, process, "plain")


def test_different_losses_are_refused(monkeypatch):
    step = {"seconds": 1.0, "peak_memory_bytes": 1}
    steps = {"ours": [step | {"loss": 1.0}] * 2, "plain": [step | {"loss": 1.1}] * 2}
    monkeypatch.setattr(bench, "_measure", lambda *arguments: steps)
    with pytest.raises(ValueError, match="the losses of the two variants differ"):
        bench.bench_train(3, "mini", 1)
