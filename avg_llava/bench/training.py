"""`avg-llava bench train`: one training step, ours against the plain loop's, on this machine.

The two variants run in separate processes, so that peak memory is that of one variant, and alternate step by step.
Weights, pixels and texts are random, which does not affect times. A step includes AdamW's update.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from avg_llava.bench.plain_loop import plain_loss
from avg_llava.bench.presets import PRESETS, Preset, check_device, compute_device, random_model
from avg_llava.bench.timing import alternate, environment
from avg_llava.checkpoints.routing_model import load_routing_model
from avg_llava.common.machine import peak_memory
from avg_llava.common.tables import render_table
from avg_llava.model.anyres import num_crops
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.splice import IGNORE_INDEX
from avg_llava.training.config import ObjectiveSettings
from avg_llava.training.flops import SampleShape, StepFlops, step_flops
from avg_llava.training.levels import TextBatch, score_answers, use_packed_attention
from avg_llava.training.objectives import objective_class
from avg_llava.training.stages import STAGES, set_trainable

Variant = Literal["ours", "plain"]
VARIANTS: tuple[Variant, ...] = ("plain", "ours")

# Samples as ((height, width) of the image in crops, prompt tokens, answer tokens). Anyres makes five crops of 2 x 2
# crops, and three of 333 x 500 pixels.
_LARGE, _PHOTO, _SMALL = (2.0, 2.0), (333 / 336, 500 / 336), (0.6, 0.8)
BATCHES: dict[int, tuple[tuple[tuple[float, float] | None, int, int], ...]] = {
    1: ((_LARGE, 2, 30), (_PHOTO, 2, 12), (_SMALL, 2, 18), (_PHOTO, 2, 24)),
    2: ((_LARGE, 20, 20), (_SMALL, 40, 10), (None, 300, 200)),
    3: ((_LARGE, 20, 20), (_PHOTO, 60, 40)),
    4: ((_LARGE, 60, 40), (_PHOTO, 180, 120)),
}


def sample_shapes(stage: int, config: AvgLlavaConfig) -> list[SampleShape]:
    """The micro-batch of a stage: images of different sizes and aspect ratios, texts of different lengths."""
    crop = config.crop_size
    shapes = []
    for size, num_prompt_tokens, num_answer_tokens in BATCHES[stage]:
        pixels = None if size is None else (round(size[0] * crop), round(size[1] * crop))
        shapes.append(SampleShape(pixels, num_prompt_tokens, num_answer_tokens))
    return shapes


def make_batch(samples: list[SampleShape], config: AvgLlavaConfig, device: torch.device) -> dict[str, Tensor]:
    """Random arguments of `Objective.forward` of these shapes, with the image placeholder after the first token."""
    generator = torch.Generator().manual_seed(0)
    longest = max(sample.num_prompt_tokens + sample.num_answer_tokens for sample in samples) + 1
    input_ids = torch.zeros(len(samples), longest, dtype=torch.long)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORE_INDEX)
    crops, sizes = [], []
    for row, sample in enumerate(samples):
        num_tokens = sample.num_prompt_tokens + sample.num_answer_tokens
        ids = torch.randint(3, config.text_config.vocab_size, (num_tokens,), generator=generator)
        if sample.image_size is not None:
            ids = torch.cat([ids[:1], torch.tensor([config.image_token_id]), ids[1:]])
            side = config.crop_size
            crops.append(torch.randn(num_crops(sample.image_size, config), 3, side, side, generator=generator))
            sizes.append(sample.image_size)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, len(ids) - sample.num_answer_tokens : len(ids)] = ids[-sample.num_answer_tokens :]
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "pixel_values": torch.nn.utils.rnn.pad_sequence(crops, batch_first=True),
        "image_sizes": torch.tensor(sizes),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def bench_train(
    stage: int, preset: Preset = "proportioned", repeats: int = 3, stored_feedback: bool = False
) -> dict[str, Any]:
    """Measures both variants and compares them.

    Args:
        repeats: Measured steps of each variant, after a warm-up; the median counts.
        stored_feedback: Stage 4 as from a feedback store: our variant holds no language model.

    Returns:
        `speedup` and `memory_ratio` of ours to the plain loop, `flop_bound_speedup` (the ratio of operations); for each
        variant seconds per step, rates, peak memory and operations; settings, machine.

    Raises:
        ValueError: The preset needs a GPU, a process ended early, the losses of the two variants differ, or
            `stored_feedback` is set for another stage than 4.
    """
    if stored_feedback and stage != 4:
        raise ValueError(f"only stage 4 learns from stored feedback, not stage {stage}")
    check_device(preset)
    use_gpu = torch.cuda.is_available()
    config = PRESETS[preset].config()
    samples = sample_shapes(stage, config)
    trains, passes = STAGES[stage].trains, STAGES[stage].passes
    levels = passes.granularities(config.granularities)
    num_tokens = sum(sample.length(level, config) for level in levels for sample in samples)

    with tempfile.TemporaryDirectory(prefix="avg-llava-bench-") as folder:
        measured = _measure(stage, preset, repeats, Path(folder) if stored_feedback else None)
    losses = {name: steps[0]["loss"] for name, steps in measured.items()}
    if abs(losses["ours"] - losses["plain"]) > (2e-2 if use_gpu else 1e-3) * abs(losses["plain"]):
        raise ValueError(f"the losses of the two variants differ, so their times are not comparable: {losses}")

    flops = {
        "plain": step_flops(trains, passes, samples, config, reference=True),
        "ours": step_flops(trains, passes.without_language_model() if stored_feedback else passes, samples, config),
    }
    figures = {name: _figures(measured[name], flops[name], len(samples), num_tokens) for name in VARIANTS}
    ours, plain = figures["ours"], figures["plain"]
    return {
        "stage": stage,
        "preset": preset,
        "stored_feedback": stored_feedback,
        "speedup": plain["seconds_per_step"] / ours["seconds_per_step"],
        "memory_ratio": ours["peak_memory_bytes"] / plain["peak_memory_bytes"],
        "flop_bound_speedup": flops["plain"].total / flops["ours"].total,
        "ours": ours,
        "plain": plain,
        "settings": {
            "model": asdict(PRESETS[preset]),
            "samples": [asdict(sample) for sample in samples],
            "levels": list(levels),
            "tokens_per_step": num_tokens,
            "repeats": repeats,
            "dtype": "bfloat16" if use_gpu else "float32",
            "recomputed_activations": use_gpu,
        },
        **environment(),
    }


def _figures(steps: list[dict[str, float]], flops: StepFlops, num_samples: int, num_tokens: int) -> dict[str, Any]:
    """Figures of one variant from its steps, of which the first is the warm-up."""
    seconds = [step["seconds"] for step in steps[1:]]
    median = statistics.median(seconds)
    return {
        "seconds_per_step": median,
        "all_seconds": seconds,
        "samples_per_second": num_samples / median,
        "tokens_per_second": num_tokens / median,
        "peak_memory_bytes": max(step["peak_memory_bytes"] for step in steps),
        "tflop_per_step": flops.total / 1e12,
        "tflop_by_part": {part: value / 1e12 for part, value in asdict(flops).items()},
        "tflop_per_second": flops.total / 1e12 / median,
    }


def _measure(stage: int, preset: Preset, repeats: int, folder: Path | None) -> dict[Variant, list[dict[str, float]]]:
    """Alternates steps of both variants, each in its process; `folder` holds the stored feedback."""
    context = multiprocessing.get_context("spawn")
    if folder is not None:
        collector = context.Process(target=_store_feedback, args=(folder, preset), daemon=True)
        collector.start()
        collector.join()
        if collector.exitcode != 0:
            raise ValueError(f"the process that stores feedback ended with code {collector.exitcode}")
    processes = []
    steps: dict[Variant, Callable[[], dict[str, float]]] = {}
    try:
        for variant in VARIANTS:
            connection, remote = context.Pipe()
            process = context.Process(target=_serve_steps, args=(remote, stage, preset, variant, folder), daemon=True)
            process.start()
            remote.close()
            processes.append(process)
            steps[variant] = partial(_request_step, connection, process, variant)
        return alternate(steps, repeats, f"bench stage {stage}")
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _request_step(connection: Connection, process: Any, variant: Variant) -> dict[str, float]:
    """Lets the process take one step and returns its seconds, loss and peak memory."""
    try:
        connection.send("step")
        measured: dict[str, float] = connection.recv()
    except (EOFError, ConnectionError) as error:
        process.join()
        reason = "killed, most likely because memory ran out" if process.exitcode == -9 else "see its traceback above"
        raise ValueError(f"the process of the {variant} step ended with code {process.exitcode}: {reason}") from error
    return measured


def _serve_steps(connection: Connection, stage: int, preset: Preset, variant: Variant, folder: Path | None) -> None:
    """Main function of a variant's process: takes one step for every message."""
    _redirect_stdout()
    step = prepare_step(stage, preset, variant, folder if variant == "ours" else None)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        begin = time.perf_counter()
        loss = step()  # waits for the GPU
        seconds = time.perf_counter() - begin
        connection.send({"seconds": seconds, "loss": loss, "peak_memory_bytes": peak_memory()})


def prepare_step(stage: int, preset: Preset, variant: Variant, folder: Path | None = None) -> Callable[[], float]:
    """Returns a function that takes one optimizer step on the stage's micro-batch and returns the loss.

    With a `folder` written by `_store_feedback` the router is trained from that stored feedback.
    """
    device = compute_device()
    config = PRESETS[preset].config()
    batch = make_batch(sample_shapes(stage, config), config, device)
    if folder is None:
        model = random_model(config)
    else:
        model = load_routing_model(folder).to(device)
        batch |= load_file(folder / _FEEDBACK, device=device.type)
    set_trainable(model, STAGES[stage])
    if device.type == "cuda" and stage != 4:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5)
    name, settings = STAGES[stage].objective, ObjectiveSettings()
    objective = objective_class(name)(model, settings).train() if variant == "ours" else None
    if objective is None:
        model.train(stage != 4)

    def step() -> float:
        loss = plain_loss(name, model, batch, settings) if objective is None else objective(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


_FEEDBACK = "feedback.safetensors"


def _store_feedback(folder: Path, preset: Preset) -> None:
    """Saves the model and the feedback of stage 4's micro-batch, as arguments of the router's objective."""
    _redirect_stdout()
    model = random_model(PRESETS[preset].config()).eval()
    batch = make_batch(sample_shapes(4, model.config), model.config, model.device)
    use_packed_attention(model)
    with torch.inference_mode():
        features = model.encode_images(batch["pixel_values"], batch["image_sizes"])
        answers = score_answers(model, features, TextBatch(*(batch[name] for name in TextBatch._fields)))
    model.save_pretrained(folder)
    feedback = {"answer_log_probs": answers.log_probs, "num_answer_tokens": answers.num_tokens[:, 0]}
    save_file({name: tensor.contiguous().cpu() for name, tensor in feedback.items()}, folder / _FEEDBACK)


def _redirect_stdout() -> None:
    """Sends libraries' output to standard error, since the command may print JSON to standard output."""
    disable_progress_bar()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def table_lines(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    stored = ", stored feedback" if result["stored_feedback"] else ""
    rows = []
    for name, key, unit, scale in (
        ("seconds per step", "seconds_per_step", "", 1),
        ("samples per second", "samples_per_second", "", 1),
        ("tokens per second", "tokens_per_second", "", 1),
        ("peak memory", "peak_memory_bytes", " GiB", 2**30),
        ("operations per step", "tflop_per_step", " TFLOP", 1),
        ("operations per second", "tflop_per_second", " TFLOP", 1),
    ):
        rows.append((name, *(f"{result[variant][key] / scale:.4g}{unit}" for variant in VARIANTS)))
    return [
        f"stage {result['stage']}, preset {result['preset']}{stored}",
        "",
        *render_table(("", "plain loop", "ours"), rows).splitlines(),
        "",
        f"speed-up {result['speedup']:.2f}x (its operations allow {result['flop_bound_speedup']:.2f}x), "
        f"memory {result['memory_ratio']:.2f}x",
    ]
