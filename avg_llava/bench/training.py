"""`avg-llava bench train`: a training step against the plain loop's, side by side on this machine.

Each way runs in a process of its own, so that peak memory is its own; the two take turns, one step each, so that what
else the machine does meets both. Weights, pixels and texts are random: they change no time. Both take AdamW's step.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.utils.logging import disable_progress_bar

from avg_llava.bench.plain_loop import plain_loss
from avg_llava.checkpoints.routing_model import load_routing_model
from avg_llava.common.machine import machine_facts, peak_memory
from avg_llava.model.anyres import num_crops
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.splice import IGNORE_INDEX
from avg_llava.training.config import ObjectiveSettings
from avg_llava.training.flops import SampleShape, StepFlops, step_flops
from avg_llava.training.levels import TextBatch, score_answers, use_packed_attention
from avg_llava.training.objectives import objective_class
from avg_llava.training.stages import STAGES, set_trainable

Way = Literal["ours", "plain"]
Preset = Literal["mini", "proportioned", "7b"]
WAYS: tuple[Way, ...] = ("plain", "ours")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model: (width, layers, feed-forward width, heads) of tower and language model."""

    vision: tuple[int, int, int, int]
    language: tuple[int, int, int, int]
    vocabulary: int
    crop: int
    """Pixels."""
    patch: int
    """Pixels."""
    router_feed_forward: int | None = None
    """Null: the language model's width."""

    def config(self) -> AvgLlavaConfig:
        """The model's configuration; the placeholder is the id after the vocabulary."""
        tower = dict(zip(_SIZES, self.vision, strict=True))
        text = dict(zip(_SIZES, self.language, strict=True))
        return AvgLlavaConfig(
            vision_config=CLIPVisionConfig(**tower, image_size=self.crop, patch_size=self.patch),
            text_config=LlamaConfig(**text, vocab_size=self.vocabulary, max_position_embeddings=4096),
            image_token_index=self.vocabulary,
            # No dropout, so that both ways compute the same loss.
            router_config={"intermediate_size": self.router_feed_forward, "dropout": 0.0},
        )


_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")

PRESETS: dict[Preset, ModelShape] = {
    "mini": ModelShape((64, 3, 128, 2), (128, 4, 344, 4), 512, crop=48, patch=6),
    # Width 512, 16 layers and 32,000 words, with CLIP's crops. Beside the language model's layers at the finest level
    # the tower takes 5% of the operations, as in the 7B model, and the router 9% instead of 4%: the part of its
    # attention over 1,148 tokens grows as the width shrinks.
    "proportioned": ModelShape(
        (192, 4, 768, 3), (512, 16, 1376, 8), 32_000, crop=336, patch=14, router_feed_forward=128
    ),
    "7b": ModelShape((1024, 24, 4096, 16), (4096, 32, 11_008, 32), 32_000, crop=336, patch=14),
}

# (height, width) of the image in crops, prompt tokens, answer tokens. 2 x 2 crops fill five, 333 x 500 pixels three.
_LARGE, _PHOTO, _SMALL = (2.0, 2.0), (333 / 336, 500 / 336), (0.6, 0.8)
BATCHES: dict[int, tuple[tuple[tuple[float, float] | None, int, int], ...]] = {
    1: ((_LARGE, 2, 30), (_PHOTO, 2, 12), (_SMALL, 2, 18), (_PHOTO, 2, 24)),
    2: ((_LARGE, 20, 20), (_SMALL, 40, 10), (None, 300, 200)),
    3: ((_LARGE, 20, 20), (_PHOTO, 60, 40)),
    4: ((_LARGE, 60, 40), (_PHOTO, 180, 120)),
}


def sample_shapes(stage: int, config: AvgLlavaConfig) -> list[SampleShape]:
    """The micro-batch of a stage: images of different sizes and shapes, texts of different lengths."""
    crop = config.vision_config.image_size
    shapes = []
    for size, num_prompt_tokens, num_answer_tokens in BATCHES[stage]:
        pixels = None if size is None else (round(size[0] * crop), round(size[1] * crop))
        shapes.append(SampleShape(pixels, num_prompt_tokens, num_answer_tokens))
    return shapes


def make_batch(samples: list[SampleShape], config: AvgLlavaConfig, device: torch.device) -> dict[str, Tensor]:
    """Random arguments of `Objective.forward` of these shapes; a placeholder stands after the first token."""
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
            side = config.vision_config.image_size
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
    """Measure both ways and compare them.

    Args:
        stage: 1 to 4.
        preset: size of the model.
        repeats: timed steps of each way, after one that is not timed.
        stored_feedback: stage 4 as from a feedback store: our way holds no language model.

    Returns:
        `speedup` and `memory_ratio` (ours to plain), `flop_bound_speedup` (what the operations saved would give at the
        same speed of computing), for each way seconds per step, rates, peak memory and operations; settings, machine.

    Raises:
        ValueError: the preset needs a GPU, a process ended early, the two ways disagree about the loss, or feedback is
            to be stored for another stage than 4.
    """
    if stored_feedback and stage != 4:
        raise ValueError(f"only stage 4 learns from stored feedback, not stage {stage}")
    use_gpu = torch.cuda.is_available()
    if preset == "7b" and not use_gpu:
        raise ValueError("the preset 7b needs a GPU; on a CPU, --preset proportioned keeps its proportions")
    config = PRESETS[preset].config()
    samples = sample_shapes(stage, config)
    trains, passes = STAGES[stage].trains, STAGES[stage].passes
    levels = passes.granularities(config.granularities)
    num_tokens = sum(sample.length(level, config) for level in levels for sample in samples)

    with (
        tempfile.TemporaryDirectory(prefix="avg-llava-bench-") as folder,
        tqdm(total=len(WAYS) * (repeats + 1), desc=f"bench stage {stage}", unit="step", disable=None) as bar,
    ):
        measured = _take_turns(stage, preset, repeats, Path(folder) if stored_feedback else None, bar.update)
    losses = {way: steps[0]["loss"] for way, steps in measured.items()}
    if abs(losses["ours"] - losses["plain"]) > (2e-2 if use_gpu else 1e-3) * abs(losses["plain"]):
        raise ValueError(f"the two ways disagree about the loss, so their times compare nothing: {losses}")

    flops = {
        "plain": step_flops(trains, passes, samples, config, reference=True),
        "ours": step_flops(trains, passes.without_language_model() if stored_feedback else passes, samples, config),
    }
    figures = {way: _figures(measured[way], flops[way], len(samples), num_tokens) for way in WAYS}
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
        "machine": machine_facts() | {"threads": torch.get_num_threads()},
    }


def _figures(steps: list[dict[str, float]], flops: StepFlops, num_samples: int, num_tokens: int) -> dict[str, Any]:
    """What one way's steps, of which the first is not timed, come to."""
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


def _take_turns(
    stage: int, preset: Preset, repeats: int, folder: Path | None, progress: Callable[[], Any]
) -> dict[Way, list[dict[str, float]]]:
    """Steps of each way, in processes of their own, one step at a time; `folder` is for stored feedback."""
    context = multiprocessing.get_context("spawn")
    if folder is not None:
        collector = context.Process(target=_store_feedback, args=(folder, preset), daemon=True)
        collector.start()
        collector.join()
        if collector.exitcode != 0:
            raise ValueError(f"the process that stores feedback ended with code {collector.exitcode}")
    measured: dict[Way, list[dict[str, float]]] = {way: [] for way in WAYS}
    connections: dict[Way, Connection] = {}
    processes = {}
    try:
        for way in WAYS:
            connections[way], theirs = context.Pipe()
            processes[way] = context.Process(target=_work, args=(theirs, stage, preset, way, folder), daemon=True)
            processes[way].start()
            theirs.close()
        for _ in range(repeats + 1):
            for way in WAYS:
                connections[way].send("step")
                measured[way].append(_receive(connections[way], processes[way], way))
                progress()
    finally:
        for process in processes.values():
            process.terminate()
            process.join()
    return measured


def _receive(connection: Connection, process: Any, way: Way) -> dict[str, float]:
    try:
        answer: dict[str, float] = connection.recv()
    except EOFError as error:
        process.join()
        reason = "killed, most likely because memory ran out" if process.exitcode == -9 else "see its traceback above"
        raise ValueError(f"the process of the {way} step ended with code {process.exitcode}: {reason}") from error
    return answer


def _work(connection: Connection, stage: int, preset: Preset, way: Way, folder: Path | None) -> None:
    """A process's life: build the model, then one step for every message."""
    _leave_stdout_alone()
    step = prepare_step(stage, preset, way, folder if way == "ours" else None)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        begin = time.perf_counter()
        loss = step()  # waits for the GPU
        seconds = time.perf_counter() - begin
        connection.send({"seconds": seconds, "loss": loss, "peak_memory_bytes": peak_memory()})


def prepare_step(stage: int, preset: Preset, way: Way, folder: Path | None = None) -> Callable[[], float]:
    """A function that takes one optimizer step on the preset's micro-batch and gives its loss.

    With a `folder` written by `_store_feedback` the step is that of our router training with stored feedback.
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
    objective = objective_class(name)(model, settings).train() if way == "ours" else None
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
    """Writes the model and the feedback for stage 4's micro-batch, as arguments of the router's objective."""
    _leave_stdout_alone()
    model = random_model(PRESETS[preset].config()).eval()
    batch = make_batch(sample_shapes(4, model.config), model.config, model.device)
    use_packed_attention(model)
    with torch.inference_mode():
        features = model.encode_images(batch["pixel_values"], batch["image_sizes"])
        answers = score_answers(model, features, TextBatch(*(batch[name] for name in TextBatch._fields)))
    model.save_pretrained(folder)
    feedback = {"answer_log_probs": answers.log_probs, "num_answer_tokens": answers.num_tokens[:, 0]}
    save_file({name: tensor.contiguous().cpu() for name, tensor in feedback.items()}, folder / _FEEDBACK)


def _leave_stdout_alone() -> None:
    """What libraries say in this process goes to standard error: the command's answer may be JSON."""
    disable_progress_bar()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def random_model(config: AvgLlavaConfig) -> AvgLlavaForConditionalGeneration:
    """The same weights in every process."""
    device = compute_device()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        model = AvgLlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return model


def compute_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def table_lines(result: dict[str, Any]) -> list[str]:
    """A result for people."""
    stored = ", stored feedback" if result["stored_feedback"] else ""
    lines = [
        f"stage {result['stage']}, preset {result['preset']}{stored}",
        "",
        f"{'':<22}{'plain loop':>16}{'ours':>16}",
    ]
    for name, key, unit, scale in (
        ("seconds per step", "seconds_per_step", "", 1),
        ("samples per second", "samples_per_second", "", 1),
        ("tokens per second", "tokens_per_second", "", 1),
        ("peak memory", "peak_memory_bytes", " GiB", 2**30),
        ("operations per step", "tflop_per_step", " TFLOP", 1),
        ("operations per second", "tflop_per_second", " TFLOP", 1),
    ):
        plain, ours = (f"{result[way][key] / scale:.4g}{unit}" for way in WAYS)
        lines.append(f"{name:<22}{plain:>16}{ours:>16}")
    return [
        *lines,
        "",
        f"speed-up {result['speedup']:.2f}x (its operations allow {result['flop_bound_speedup']:.2f}x), "
        f"memory {result['memory_ratio']:.2f}x",
    ]
