"""Estimates of a training run before it starts: memory per GPU, operations, steps and hours (`avg-llava estimate`).

No weights are loaded: parameters are counted on the meta device. Sequence lengths come from a random sample of the data
if these exist, and from a typical sample otherwise, which the estimate states.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from avg_llava.checkpoints.quantization import quantizable_layers
from avg_llava.common.machine import GPUS
from avg_llava.common.settings import ConfigError
from avg_llava.common.tables import render_table
from avg_llava.data.sampler import fill
from avg_llava.data.verify import TOTAL
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.planning.memory import FLOAT32, SHARDINGS, Activations, activation_memory, sharding_of, state_memory
from avg_llava.planning.meta_model import find_model_config, meta_model
from avg_llava.training.assembly import build_dataset, load_processor, weights_dtype
from avg_llava.training.config import SourceSettings, TrainConfig, load_config
from avg_llava.training.flops import SampleShape, shapes_of, step_flops
from avg_llava.training.lora import AdapterShape, adapter_shapes
from avg_llava.training.losses import num_supervised
from avg_llava.training.processes import read_deepspeed_file
from avg_llava.training.stages import OBJECTIVES, STAGES, Part, count_parameters

GIB, MIB = 2**30, 2**20
NUM_SAMPLED = 64  # samples measured, if the data exist
MICRO_BATCHES_FILLED = 64  # at least, to find the mean number of samples within a token budget
RESERVED = 0.08  # share of a GPU's memory taken by CUDA, NCCL and fragmentation
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")  # of a GPU's memory

# A photo of 640 x 480 pixels with a caption, or with system prompt, question and an answer of some sentences.
TYPICAL_SAMPLES = {
    1: SampleShape((480, 640), 2, 20),
    **dict.fromkeys((2, 3, 4), SampleShape((480, 640), 120, 130)),
}


@dataclass(frozen=True)
class Request:
    """Inputs of an estimate in addition to the configuration; None: from the data, or assumed.

    Attributes:
        gpu: A key of `GPUS`.
        zero: Name of one of `SHARDINGS`; None: that of `runtime.deepspeed`.
        mfu: Model FLOPs utilization: share of the GPU's peak operations per second.
        num_samples: Samples of an epoch.
        image_size: (height, width) of every image.
        num_prompt_tokens: Text tokens of every prompt.
        model_of: Configuration file of the stage that produces `model.start`.
    """

    num_gpus: int = 8
    gpu: str = "h100"
    zero: str | None = None
    mfu: float = 0.4
    num_samples: int | None = None
    image_size: tuple[int, int] | None = None
    num_prompt_tokens: int | None = None
    num_answer_tokens: int | None = None
    model_of: Path | None = None


def estimate(path: Path, request: Request, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Estimates memory, operations and time of the run of a YAML file; JSON-serializable, sizes in bytes.

    `overrides` change values of the file, as in :func:`load_config`.

    Raises:
        ConfigError: The configuration does not fit the number of GPUs, or the model's shape cannot be found.
    """
    config = load_config(path, overrides)
    if not 0 < request.mfu <= 1:
        raise ConfigError(f"the MFU is a share of the GPU's operations, above 0 and at most 1; got {request.mfu}")
    model_config, assumptions = find_model_config(config, path, request.model_of)
    shapes, num_samples, source = _samples(config, model_config, request)
    accumulation, budget = config.accumulation_steps(request.num_gpus), config.optim.max_tokens_per_batch
    model = meta_model(config, model_config)
    counts, adapters = count_parameters(model), adapter_shapes(model)
    num_parameters = sum(count.total for count in counts.values())
    num_trained = sum(count.trainable for count in counts.values())

    deepspeed = None if config.runtime.deepspeed is None else read_deepspeed_file(config.runtime.deepspeed)
    chosen, possible, quantized = sharding_of(deepspeed), SHARDINGS, []
    if request.zero is not None:
        chosen = next(sharding for sharding in SHARDINGS if sharding.name == request.zero)
    if config.lora is not None and config.lora.quantization is not None:
        if chosen.zero == 3:
            raise ConfigError("lora.quantization: ZeRO-3 cannot shard 4-bit weights; choose another ZeRO stage")
        possible = tuple(sharding for sharding in SHARDINGS if sharding.zero != 3)
        quantized = [layer.weight.numel() for _, layer in quantizable_layers(model)]
    trains = STAGES[config.stage].trains
    element_size = 4 if config.runtime.precision == "fp32" else 2
    activations = _activations(config, model_config, shapes, adapters, element_size)
    memory: dict[str, dict[str, Any]] = {}
    for sharding in dict.fromkeys((*possible, chosen)):
        state = state_memory(
            sharding,
            num_parameters,
            num_trained,
            element_size,
            request.num_gpus,
            model_config.text_config.hidden_size,
            zero=None if deepspeed is None else deepspeed.get("zero_optimization"),
            trained_size=FLOAT32 if "router" in trains else element_size,
            frozen_size=weights_dtype(config).itemsize,
            quantized=quantized,
        )
        parts = asdict(state) | {"activations": activations.kept, "logits": activations.logits}
        total = sum(parts[part] for part in PARTS)
        fits = total <= GPUS[request.gpu].memory * (1 - RESERVED)
        memory[sharding.name] = parts | {"total": total, "fits": fits}

    step_samples = _samples_per_step(config, model_config, shapes)
    flops = (
        step_flops(trains, config.passes, shapes, model_config, adapters=adapters).total / len(shapes) * step_samples
    )
    passes = OBJECTIVES[config.objective_name].passes
    levels = passes.granularities(model_config.granularities)
    share = 1 / len(levels) if passes.sampled else 1  # of a sample with an image, at each level
    tokens = sum(
        _length(shape, level, model_config) * (1 if shape.image_size is None else share)
        for shape in shapes
        for level in levels
        if shape.image_size is not None or level == levels[-1]
    )
    steps = config.optim.max_steps
    if steps is None and num_samples is not None:
        steps = math.ceil(math.ceil(num_samples / step_samples) * config.optim.epochs)
    peak = GPUS[request.gpu].peak(config.runtime.precision, config.runtime.tf32)
    speed = peak * request.mfu * request.num_gpus
    seconds = flops / speed
    feedback = None
    if config.objective.feedback_store is not None:
        total, sample_flops = _feedback(config, model_config, shapes, element_size)
        hours = None if num_samples is None else num_samples * sample_flops / speed / 3600
        feedback = {"memory": total, "fits": total <= GPUS[request.gpu].memory * (1 - RESERVED), "hours": hours}
    return {
        "config": str(path),
        "stage": config.stage,
        "model": {
            "parameters": num_parameters,
            "trained": num_trained,
            "by_part": {part: asdict(count) for part, count in counts.items()},
        },
        "assumptions": [*assumptions, source],
        "hardware": {"gpu": request.gpu, "gpus": request.num_gpus, "memory": GPUS[request.gpu].memory, "peak": peak},
        "precision": config.runtime.precision,
        "sharding": chosen.name,
        "memory": memory,
        "step": {
            "samples": step_samples,
            "micro_batch_size": config.optim.micro_batch_size if budget is None else None,
            "max_tokens_per_batch": budget,
            "accumulation_steps": accumulation,
            "tokens": round(tokens / len(shapes) * step_samples),
            "flops": flops,
            "seconds": seconds,
        },
        "mfu": request.mfu,
        "samples": num_samples,
        "steps": steps,
        "hours": None if steps is None else steps * seconds / 3600,
        "feedback": feedback,
    }


def table_lines(result: dict[str, Any]) -> list[str]:
    """An estimate as lines of text."""
    model, hardware, step = result["model"], result["hardware"], result["step"]
    budget = step["max_tokens_per_batch"]
    size = step["micro_batch_size"] if budget is None else f"{budget:,} tokens"
    is_large = max(memory["total"] for memory in result["memory"].values()) >= GIB
    unit, unit_name = (GIB, "GiB") if is_large else (MIB, "MiB")
    memory = result["memory"]
    rows = [
        ["in host memory" if part == "host" else part, *(f"{each[part] / unit:.2f}" for each in memory.values())]
        for part in (*PARTS, "total", "host")
    ]
    fits = ["yes" if each["fits"] else "no" for each in memory.values()]
    rows.append([f"fits into {hardware['memory'] / 1e9:.0f} GB", *fits])
    lines = [
        f"stage {result['stage']} ({result['config']}) in {result['precision']} on {hardware['gpus']} x "
        f"{hardware['gpu']}, ZeRO: {result['sharding']}",
        f"model: {model['parameters']:,} parameters, {model['trained']:,} trained",
        *(f"assumed: {assumption}" for assumption in result["assumptions"]),
        "",
        render_table([f"{unit_name} per GPU, ZeRO:", *memory], rows),
        "",
        f"a step: {step['samples']:.4g} samples in {step['accumulation_steps']} x {size} per GPU, "
        f"{step['tokens']:,} tokens, {step['flops'] / 1e12:,.2f} TFLOP, {step['seconds']:.3g} s at an MFU of "
        f"{result['mfu']:.0%}",
    ]
    feedback = result["feedback"]
    if feedback is not None:
        duration = "" if feedback["hours"] is None else f", {feedback['hours']:.3g} hours"
        verdict = "fits" if feedback["fits"] else "does not fit"
        amount = f"{feedback['memory'] / unit:.2f} {unit_name} per GPU"
        lines.append(f"the feedback, once: {amount}, which {verdict}{duration}")
    if result["steps"] is None:
        return [*lines, "a run: the number of samples is not known; give it with --num-samples"]
    return [*lines, f"a run: {result['steps']:,} steps, {result['hours']:.3g} hours"]


def _activations(
    config: TrainConfig,
    model_config: AvgLlavaConfig,
    shapes: Sequence[SampleShape],
    adapters: Mapping[Part, AdapterShape],
    element_size: int,
) -> Activations:
    """Activations of a micro-batch of the longest samples."""
    finest = model_config.granularities[-1]
    longest = sorted(shapes, key=lambda shape: -shape.length(finest, model_config))
    size = config.optim.micro_batch_size
    if config.optim.max_tokens_per_batch is not None:
        size = max(config.optim.max_tokens_per_batch // _length(longest[0], finest, model_config), 1)
    return activation_memory(
        STAGES[config.stage].trains,
        config.passes,
        (longest * math.ceil(size / len(longest)))[:size],
        model_config,
        element_size,
        recompute=config.runtime.gradient_checkpointing,
        adapters=adapters,
        adapter_dropout=0.0 if config.lora is None else config.lora.dropout,
    )


def _feedback(
    config: TrainConfig, model_config: AvgLlavaConfig, shapes: Sequence[SampleShape], element_size: int
) -> tuple[float, float]:
    """Bytes per GPU and operations per sample of collecting the feedback that a run reads from its store."""
    without_store = replace(config, objective=replace(config.objective, feedback_store=None))
    counts = count_parameters(meta_model(without_store, model_config))
    passes = replace(without_store.passes, router=False)
    longest = max(shapes, key=lambda shape: shape.length(model_config.granularities[-1], model_config))
    samples = [longest] * config.optim.micro_batch_size
    activations = activation_memory((), passes, samples, model_config, element_size, recompute=False)
    weights = element_size * sum(count.total for count in counts.values())
    flops = step_flops((), passes, shapes, model_config).total / len(shapes)
    return weights + activations.kept + activations.logits, flops


def _samples(
    config: TrainConfig, model_config: AvgLlavaConfig, request: Request
) -> tuple[list[SampleShape], int | None, str]:
    """Shapes of samples, the number of samples per epoch (None: unknown), and their source in words.

    The shapes are those of samples of the data if these and the tokenizer exist and none is given, else a typical one.
    """
    requested = {field.name: getattr(request, field.name) for field in fields(SampleShape)}
    given = {name: value for name, value in requested.items() if value is not None}
    if not given and _is_available(config):
        return _sample_data(config, request)
    shape = replace(TYPICAL_SAMPLES[config.stage], **given)
    assert shape.image_size is not None, "a typical sample has an image"
    height, width = shape.image_size
    source = (
        f"every sample has an image of {width}x{height} pixels, {shape.num_prompt_tokens} tokens of prompt and "
        f"{shape.num_answer_tokens} of answer"
    )
    num_records = request.num_samples
    if num_records is None and (num_records := _expected_records(config.data.sources)) is not None:
        source += f"; the data are about {num_records:,} samples"
    return [shape], num_records, source


def _expected_records(sources: Sequence[SourceSettings]) -> int | None:
    """Samples per epoch, if all sources sample a fixed number of records or have an expected one."""
    total = 0.0
    for source in sources:
        _, _, count = (source.sampling or "").partition(":")
        known = int(count) if count.isdigit() else (source.expected or {}).get(TOTAL)
        if known is None:
            return None
        total += known * source.weight
    return round(total)


def _is_available(config: TrainConfig) -> bool:
    """True if samples can be encoded without downloads."""
    folders = [config.model.start] if config.model.start else [config.model.vision, config.model.language]
    roots = [source.image_root for source in config.data.sources if source.image_root is not None]
    return all(Path(folder).is_dir() for folder in (*folders, *roots) if folder) and all(
        Path(source.path).is_file() for source in config.data.sources
    )


def _sample_data(config: TrainConfig, request: Request) -> tuple[list[SampleShape], int, str]:
    """Shapes of a random selection of the run's samples."""
    processor, model_config = load_processor(config)
    dataset = build_dataset(config, processor, model_config)
    indices = random.Random(config.seed).sample(range(len(dataset)), min(NUM_SAMPLED, len(dataset)))
    shapes: list[SampleShape] = []
    for index in indices:
        sample = dataset.sample(index)
        sizes = [(image.height, image.width) for image in dataset.open_images(sample)]
        text = dataset.encode_text(sample, sizes)
        answer = int(num_supervised(text.labels[None]))
        prompt = len(text.input_ids) - text.num_images - answer
        shapes += shapes_of(sizes[: text.num_images], prompt, answer)
    source = f"samples are like {len(indices)} sampled from the data"
    return shapes, request.num_samples or len(dataset), source


def _length(shape: SampleShape, level: int, model_config: AvgLlavaConfig) -> int:
    """Sequence length of a sample at a level, truncated to the maximum."""
    return min(shape.length(level, model_config), model_config.max_sequence_length)


def _samples_per_step(config: TrainConfig, model_config: AvgLlavaConfig, shapes: Sequence[SampleShape]) -> float:
    """Samples per optimizer step; with a token budget, the mean over micro-batches filled with these samples."""
    optim = config.optim
    if optim.max_tokens_per_batch is None:
        return optim.global_batch_size
    lengths = [_length(shape, model_config.granularities[-1], model_config) for shape in shapes]
    order = list(range(len(lengths))) * math.ceil(MICRO_BATCHES_FILLED * optim.max_tokens_per_batch / sum(lengths))
    full = fill(order, lengths, optim.max_tokens_per_batch)[:-1]  # the last one may not be full
    return sum(map(len, full)) / len(full) * optim.global_batch_size / optim.micro_batch_size
