"""Memory of a training step on each GPU, by part, worked out from shapes.

Activations are what autograd keeps of a forward pass for the backward pass, layer by layer, as counted from the layers'
operations; with recomputation, each layer's input, and one layer in full. Small vectors (statistics of norms, masks)
are left out.

Shapes: C crops, T tokens of all sequences that are in memory together, K supervised ones, D width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from avg_llava.model.anyres import num_crops
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.packing import MAX_LOGITS
from avg_llava.training.checkpoint import MASTER_WEIGHT_BYTES, MOMENT_BYTES
from avg_llava.training.flops import SampleShape
from avg_llava.training.lora import AdapterShape
from avg_llava.training.stages import STAGES, Part

FLOAT32 = 4


@dataclass(frozen=True)
class Sharding:
    """How the state of training is divided among GPUs.

    Attributes:
        zero: ZeRO stage; None without DeepSpeed.
        offload_optimizer: Optimizer states, and the gradients that go into them, are in host memory.
        offload_parameters: Parameters are in host memory; those of the layers at work come to the GPU.
    """

    zero: int | None
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def name(self) -> str:
        """How tables and the command line call it."""
        if self.zero is None:
            return "none"
        return f"{self.zero}-offload" if self.offload_optimizer or self.offload_parameters else str(self.zero)


SHARDINGS = (*(Sharding(zero) for zero in (None, 0, 1, 2, 3)), Sharding(3, True, True))


@dataclass(frozen=True)
class StateMemory:
    """Bytes on each GPU of what does not depend on the batch; `host` is in the machine's memory, for each GPU."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    host: float


@dataclass(frozen=True)
class Activations:
    """Bytes of what depends on the micro-batch."""

    vision: float
    language: float
    router: float
    logits: float

    @property
    def kept(self) -> float:
        """All but the logits."""
        return self.vision + self.language + self.router


def sharding_of(deepspeed: Mapping[str, Any] | None) -> Sharding:
    """The sharding that a parsed DeepSpeed file asks for."""
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
) -> StateMemory:
    """Parameters, gradients, AdamW's states and DeepSpeed's buffers.

    Without DeepSpeed weights are float32 themselves, and autocast keeps a copy of the trained ones in the run's type.
    With it, the optimizer holds float32 master weights. ZeRO-1 divides the optimizer's states, ZeRO-2 gradients as
    well, ZeRO-3 parameters as well. What is offloaded is divided in the same way.

    Args:
        sharding: how state is divided.
        num_parameters: of the whole model.
        num_trained: of these, those that are trained.
        element_size: bytes of a weight in the run's precision.
        num_gpus: over which state is divided.
        hidden_size: of the language model; "auto" bucket sizes are its square.
        zero: the section `zero_optimization` of a DeepSpeed file, for the sizes of buckets.
        trained_size: bytes of a weight that is trained, and of its gradient; None: as of any other.
    """
    if sharding.zero is None:
        autocast = element_size * num_trained if element_size < FLOAT32 else 0
        return StateMemory(FLOAT32 * num_parameters, FLOAT32 * num_trained, MOMENT_BYTES * num_trained, autocast, 0)
    trained_size = trained_size or element_size
    parts = [num_gpus if sharding.zero >= stage else 1 for stage in (1, 2, 3)]
    optimizer = (MASTER_WEIGHT_BYTES + MOMENT_BYTES) * num_trained / parts[0]
    gradients = trained_size * num_trained / parts[1]
    parameters = (element_size * (num_parameters - num_trained) + trained_size * num_trained) / parts[2]
    settings = dict(zero or {})
    buffers = 0.0
    if sharding.zero >= 1:
        bucket = _number(settings.get("reduce_bucket_size"), hidden_size**2)
        buffers += trained_size * min(bucket, num_trained) * (2 if settings.get("overlap_comm", True) else 1)
    if sharding.zero == 3:
        buffers += element_size * min(_number(settings.get("stage3_max_live_parameters"), 10**9), num_parameters)
    host = 0.0
    if sharding.offload_optimizer:
        host += optimizer + FLOAT32 * num_trained / parts[1]  # DeepSpeed's own gradients on the host are float32
        optimizer = gradients = 0.0
    if sharding.offload_parameters:
        host += parameters
        parameters = 0.0
    return StateMemory(parameters, gradients, optimizer, buffers, host)


def activation_memory(
    stage: int,
    samples: Sequence[SampleShape],
    config: AvgLlavaConfig,
    element_size: int,
    recompute: bool,
    stored_feedback: bool = False,
    draws_level: bool = False,
    adapters: Mapping[Part, AdapterShape] | None = None,
    adapter_dropout: float = 0.0,
) -> Activations:
    """What a micro-batch keeps for the backward pass when all levels go through the language model as one packed row.

    Args:
        stage: 1 to 4.
        samples: the micro-batch.
        config: a model with a CLIP tower and a language model of Llama's shape.
        element_size: bytes of an activation in the run's precision.
        recompute: activations of tower and language model are computed again in the backward pass.
        stored_feedback: stage 4 reads its feedback from a store.
        draws_level: stage 4 learns from the loss at one level, here the finest.
        adapters: of LoRA, in the parts that are trained through them.
        adapter_dropout: of their inputs.
    """
    trains = STAGES[stage].trains
    levels = config.granularities if stage > 2 and not draws_level else config.granularities[-1:]
    crops = sum(num_crops(sample.image_size, config) for sample in samples if sample.image_size is not None)
    tokens = answers = 0
    for level in () if stored_feedback else levels:
        for sample in samples:
            if sample.image_size is not None or level == levels[-1]:
                tokens += min(sample.length(level, config), config.max_sequence_length)
                answers += sample.num_answer_tokens
    is_learning = stage != 4 or draws_level  # through the language model
    depths: dict[Part, int] = {
        "vision": config.vision_config.num_hidden_layers,
        "llm": config.text_config.num_hidden_layers,
    }
    extra = {
        part: _adapter(adapters[part], depth, element_size, adapter_dropout) if adapters and part in adapters else 0.0
        for part, depth in depths.items()
    }
    return Activations(
        vision=_vision(crops, config, element_size, recompute, "vision" in trains, stage != 4, extra["vision"]),
        language=_language(tokens, config, element_size, recompute, "llm" in trains, is_learning, extra["llm"]),
        router=_router(crops, config) if stage == 4 else 0.0,
        logits=_logits(answers, config, element_size, is_learning),
    )


def _adapter(shape: AdapterShape, depth: int, size: int, dropout: float) -> float:
    """Bytes that the adapters of one of `depth` layers keep of a token, beside what matrices keep that are trained.

    With dropout each has an input of its own, and a mask; without, they share what the matrices would keep.
    """
    inputs = shape.inputs * (size + 1) if dropout > 0 else 0
    return (inputs + shape.ranks * size) / depth


def _vision(
    crops: int, config: AvgLlavaConfig, size: int, recompute: bool, trained: bool, learning: bool, extra: float
) -> float:
    """Pixels, tower (with `extra` bytes a row and layer) and projector.

    A frozen tower keeps nothing; its hidden states are all there until it ends.
    """
    tower, width = config.vision_config, config.text_config.hidden_size
    patches = config.num_patches_per_side**2
    rows = crops * (patches + 1)
    pixels = crops * tower.num_channels * tower.image_size**2 * (FLOAT32 + (size if size < FLOAT32 else 0))
    # Two norms' inputs and outputs, queries, keys, values and attention's result; the feed-forward part's input to its
    # activation, the activation's factor and its result.
    layer = rows * (size * (8 * tower.hidden_size + 3 * tower.intermediate_size) + extra)
    hidden = rows * size * tower.hidden_size * (tower.num_hidden_layers + 1)
    if not trained:
        kept = hidden
    elif recompute:
        kept = hidden + layer
    else:
        kept = layer * tower.num_hidden_layers + rows * size * tower.hidden_size
    projector = crops * patches * size * ((tower.hidden_size + 3 * width) if learning else width)
    return float(pixels + kept + projector)


def _language(
    tokens: int, config: AvgLlavaConfig, size: int, recompute: bool, trained: bool, learning: bool, extra: float
) -> float:
    """Embeddings (of the texts, spliced, packed) and layers (with `extra` bytes a token each).

    Frozen matrices do not keep their inputs.
    """
    text = config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    key_value = 2 * text.num_key_value_heads * (width // text.num_attention_heads)
    embeddings = 3 * tokens * size * width
    # Norms work in float32: their inputs and what they divide by. In float32 training the input is no copy.
    norms = 2 * FLOAT32 * width
    attention = size * (2 * width + key_value)
    feed_forward = size * 3 * inner
    matrices = size * (4 * width + inner) if trained else 0  # what comes out of the norms, and the product of gates
    layer = tokens * (norms + attention + feed_forward + matrices + extra)
    if not learning:
        return float(embeddings + layer)
    if recompute:
        return float(embeddings + tokens * size * width * text.num_hidden_layers + layer)
    return float(embeddings + layer * text.num_hidden_layers)


def _router(crops: int, config: AvgLlavaConfig) -> float:
    """The fusion layer and the MLP over the tokens of all levels and the text slots of every crop, in float32."""
    router, width = config.router_config, config.text_config.hidden_size
    tokens = crops * (sum(config.granularities) + router.num_text_tokens)
    inner = router.intermediate_size or width
    dropout = (2 * width + inner) if router.dropout > 0 else 0  # masks
    return float(tokens * FLOAT32 * (12 * width + 2 * inner + dropout))


def _logits(answers: int, config: AvgLlavaConfig, size: int, learning: bool) -> float:
    """One chunk of the head's logits: as computed, in float32, their log-probabilities and, learning, gradients."""
    vocabulary = config.text_config.vocab_size
    rows = min(answers, max(MAX_LOGITS // vocabulary, 1))
    per_logit = FLOAT32 + FLOAT32 + (size if size < FLOAT32 else 0)
    if learning:
        per_logit += FLOAT32 + (size if size < FLOAT32 else 0)
    return float(rows * vocabulary * per_logit)


def _number(value: Any, automatic: int) -> int:
    return automatic if value in (None, "auto") else int(value)


__all__ = ["SHARDINGS", "Activations", "Sharding", "StateMemory", "activation_memory", "sharding_of", "state_memory"]
