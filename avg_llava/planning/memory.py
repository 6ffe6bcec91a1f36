"""Memory of a training step on each GPU, by part, computed from shapes.

Activations are the tensors that autograd saves in the forward pass for the backward pass, counted layer by layer from
the layers' operations. With activation recomputation these are each layer's input, and one layer in full. Small vectors
(norm statistics, masks) are not counted.

Shapes: C crops, T tokens of all sequences in memory at once, K supervised tokens, D width, V vocabulary.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from avg_llava.checkpoints.quantization import BYTES_PER_WEIGHT
from avg_llava.model.anyres import num_crops
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.language import language_parts
from avg_llava.model.packing import MAX_LOGITS
from avg_llava.model.router import find_router
from avg_llava.training.checkpoint import MASTER_WEIGHT_BYTES, MOMENT_BYTES
from avg_llava.training.flops import SampleShape
from avg_llava.training.lora import AdapterShape
from avg_llava.training.stages import Part, Passes

FLOAT32 = 4


@dataclass(frozen=True)
class Sharding:
    """Sharding of parameters, gradients and optimizer states over GPUs.

    Attributes:
        zero: ZeRO stage; None without DeepSpeed.
        offload_optimizer: Optimizer states and their gradients are in host memory.
        offload_parameters: Parameters are in host memory; those of the current layers are copied to the GPU.
    """

    zero: int | None
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def name(self) -> str:
        """The name in tables and on the command line."""
        if self.zero is None:
            return "none"
        return f"{self.zero}-offload" if self.offload_optimizer or self.offload_parameters else str(self.zero)


SHARDINGS = (*(Sharding(zero) for zero in (None, 0, 1, 2, 3)), Sharding(3, True, True))


@dataclass(frozen=True)
class StateMemory:
    """Bytes per GPU that do not depend on the batch; `host` is host memory per GPU."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    host: float


@dataclass(frozen=True)
class Activations:
    """Bytes per GPU that depend on the micro-batch."""

    vision: float
    language: float
    router: float
    logits: float

    @property
    def kept(self) -> float:
        """Sum without the logits."""
        return self.vision + self.language + self.router


def sharding_of(deepspeed: Mapping[str, Any] | None) -> Sharding:
    """The sharding of a parsed DeepSpeed file."""
    if deepspeed is None:
        return Sharding(None)
    zero = deepspeed.get("zero_optimization", {})
    on_host = [zero.get(name, {}).get("device", "none") != "none" for name in ("offload_optimizer", "offload_param")]
    return Sharding(zero.get("stage", 0), *on_host)


def state_memory(
    sharding: Sharding,
    num_parameters: int,
    num_trained: int,
    element_size: int,
    num_gpus: int,
    hidden_size: int,
    zero: Mapping[str, Any] | None = None,
    trained_size: int | None = None,
    frozen_size: int = FLOAT32,
    quantized: Sequence[int] = (),
) -> StateMemory:
    """Memory of parameters, gradients, AdamW's states and DeepSpeed's buffers.

    Without DeepSpeed, trained weights are float32, and autocast keeps a copy of them in the run's precision. With
    DeepSpeed, the optimizer holds float32 master weights. ZeRO-1 shards optimizer states, ZeRO-2 also gradients, ZeRO-3
    also parameters. Offloaded tensors are sharded in the same way.

    Args:
        element_size: Bytes of a weight in the run's precision.
        hidden_size: Width of the language model; bucket sizes "auto" are its square.
        zero: Section `zero_optimization` of the DeepSpeed file, for bucket sizes.
        trained_size: Bytes of a trained weight and of its gradient; None: `element_size`.
        frozen_size: Bytes of a frozen weight without DeepSpeed.
        quantized: Frozen weights of each 4-bit layer. The weights of one layer at a time are dequantised. ZeRO-3 cannot
            shard them.
    """
    num_parameters -= sum(quantized)
    packed, dequantized = BYTES_PER_WEIGHT * sum(quantized), element_size * max(quantized, default=0)
    if sharding.zero is None:
        autocast = element_size * num_trained if element_size < FLOAT32 else 0
        whole = frozen_size * (num_parameters - num_trained) + FLOAT32 * num_trained
        trained = FLOAT32 * num_trained, MOMENT_BYTES * num_trained
        return StateMemory(whole + packed, *trained, autocast + dequantized, 0)
    assert not quantized or sharding.zero < 3, "refused by check_quantization"
    trained_size = trained_size or element_size
    parts = [num_gpus if sharding.zero >= stage else 1 for stage in (1, 2, 3)]
    optimizer = (MASTER_WEIGHT_BYTES + MOMENT_BYTES) * num_trained / parts[0]
    gradients = trained_size * num_trained / parts[1]
    parameters = (element_size * (num_parameters - num_trained) + trained_size * num_trained) / parts[2] + packed
    settings = dict(zero or {})
    buffers = float(dequantized)
    if sharding.zero >= 1:
        bucket = _number(settings.get("reduce_bucket_size"), hidden_size**2)
        buffers += trained_size * min(bucket, num_trained) * (2 if settings.get("overlap_comm", True) else 1)
    if sharding.zero == 3:
        buffers += element_size * min(_number(settings.get("stage3_max_live_parameters"), 10**9), num_parameters)
    host = 0.0
    if sharding.offload_optimizer:
        host += optimizer + FLOAT32 * num_trained / parts[1]  # gradients on the host are float32
        optimizer = gradients = 0.0
    if sharding.offload_parameters:
        host += parameters
        parameters = 0.0
    return StateMemory(parameters, gradients, optimizer, buffers, host)


def activation_memory(
    trains: Collection[Part],
    passes: Passes,
    samples: Sequence[SampleShape],
    config: AvgLlavaConfig,
    element_size: int,
    recompute: bool,
    adapters: Mapping[Part, AdapterShape] | None = None,
    adapter_dropout: float = 0.0,
) -> Activations:
    """Activations of a micro-batch whose sequences go through the language model as one packed row.

    Args:
        passes: Passes of the objective; with `sampled`, the finest level is assumed.
        config: Configuration of a model with a CLIP tower and a Llama-like language model.
        element_size: Bytes of an activation in the run's precision.
        recompute: Activations of vision tower and language model are recomputed in the backward pass.
        adapters: LoRA adapters, by part.
        adapter_dropout: Dropout probability of the adapters' inputs.
    """
    adapters = adapters or {}
    levels = passes.granularities(config.granularities)
    levels = levels[-1:] if passes.sampled else levels
    crops = sum(num_crops(sample.image_size, config) for sample in samples if sample.image_size is not None)
    tokens = answers = 0
    for level in levels:
        for sample in samples:
            if sample.image_size is not None or level == levels[-1]:
                tokens += min(sample.length(level, config), config.max_sequence_length)
                answers += sample.num_answer_tokens
    differentiates_vision = any(part in trains for part in ("vision", "projector", "newline"))
    tower = _adapter(adapters.get("vision"), config.vision_config.num_hidden_layers, element_size, adapter_dropout)
    text = _adapter(adapters.get("llm"), config.text_config.num_hidden_layers, element_size, adapter_dropout)
    backward = passes.language_backward
    return Activations(
        vision=_vision(crops, config, element_size, recompute, "vision" in trains, differentiates_vision, tower),
        language=_language(tokens, config, element_size, recompute, "llm" in trains, backward, text),
        router=find_router(config).activation_bytes(crops, config) if passes.router else 0.0,
        logits=_logits(answers, config, element_size, backward),
    )


def _adapter(shape: AdapterShape | None, depth: int, size: int, dropout: float) -> float:
    """Bytes per token that the adapters of one of `depth` layers save, in addition to those of trained matrices.

    With dropout, each adapter saves its input and a mask; without, it shares the input that the matrix would save.
    """
    if shape is None:
        return 0.0
    inputs = shape.inputs * (size + 1) if dropout > 0 else 0
    return (inputs + shape.ranks * size) / depth


def _vision(
    crops: int, config: AvgLlavaConfig, size: int, recompute: bool, trained: bool, backward: bool, extra: float
) -> float:
    """Pixels, vision tower (with `extra` bytes per token and layer) and projector.

    A frozen tower saves nothing, but its hidden states are in memory until it ends.
    """
    tower, width = config.vision_config, config.text_config.hidden_size
    patches = config.num_patches_per_side**2
    rows = crops * (patches + config.num_prefix_tokens)
    pixels = crops * tower.num_channels * config.crop_size**2 * (FLOAT32 + (size if size < FLOAT32 else 0))
    # Inputs and outputs of two norms, queries, keys, values and attention output; input, factor and output of the
    # feed-forward activation, and of a gated one the gate.
    feed_forward = config.tower.feed_forward(tower)
    inner = (feed_forward.matrices + 1) * feed_forward.width
    layer = rows * (size * (8 * tower.hidden_size + inner) + extra)
    hidden = rows * size * tower.hidden_size * (tower.num_hidden_layers + 1)
    if not trained:
        kept = hidden
    elif recompute:
        kept = hidden + layer
    else:
        kept = layer * tower.num_hidden_layers + rows * size * tower.hidden_size
    projector = crops * patches * size * ((tower.hidden_size + 3 * width) if backward else width)
    return float(pixels + kept + projector)


def _language(
    tokens: int, config: AvgLlavaConfig, size: int, recompute: bool, trained: bool, backward: bool, extra: float
) -> float:
    """Embeddings (of texts, spliced, packed) and layers (with `extra` bytes per token and layer).

    Frozen matrices do not save their inputs.
    """
    text = config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    parts = language_parts(text)
    embeddings = 3 * tokens * size * width
    # Norms compute in float32 and save input and divisor. In float32 training the input is not copied.
    norms = 2 * FLOAT32 * width
    attention = size * (2 * parts.attention_width + parts.key_value_width)
    feed_forward = size * 3 * inner
    matrices = size * (4 * width + inner) if trained else 0  # outputs of the norms, and the gated product
    layer = tokens * (norms + attention + feed_forward + matrices + extra)
    if not backward:
        return float(embeddings + layer)
    if recompute:
        return float(embeddings + tokens * size * width * text.num_hidden_layers + layer)
    return float(embeddings + layer * text.num_hidden_layers)


def _logits(answers: int, config: AvgLlavaConfig, size: int, backward: bool) -> float:
    """One chunk of logits: as computed, in float32, log-probabilities and, with a backward pass, gradients."""
    vocabulary = config.text_config.vocab_size
    rows = min(answers, max(MAX_LOGITS // vocabulary, 1))
    per_logit = FLOAT32 + FLOAT32 + (size if size < FLOAT32 else 0)
    if backward:
        per_logit += FLOAT32 + (size if size < FLOAT32 else 0)
    return float(rows * vocabulary * per_logit)


def _number(value: Any, automatic: int) -> int:
    return automatic if value in (None, "auto") else int(value)
