"""Floating-point operations of a training step, counted from shapes: what a step cannot do without.

A multiplication and its addition are two operations. A backward pass counts twice its forward pass, once where a part
is frozen but gradients pass through it. Norms, activations and softmaxes are left out.

Shapes: C crops, T tokens of a sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from avg_llava.model.anyres import num_crops, num_visual_tokens
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.training.lora import AdapterShape
from avg_llava.training.stages import STAGES, Part


@dataclass(frozen=True)
class SampleShape:
    """What a sample costs depends on: its image (or none) and its texts.

    Attributes:
        image_size: (height, width) in pixels, or None.
        num_prompt_tokens: Text tokens that are not supervised, without the image's placeholder.
        num_answer_tokens: Supervised tokens, at the end.
    """

    image_size: tuple[int, int] | None
    num_prompt_tokens: int
    num_answer_tokens: int

    def length(self, granularity: int, config: AvgLlavaConfig) -> int:
        """Tokens that the language model sees with the image at a level."""
        visual = 0 if self.image_size is None else num_visual_tokens(self.image_size, granularity, config)
        return visual + self.num_prompt_tokens + self.num_answer_tokens


def shapes_of(
    image_sizes: Sequence[tuple[int, int]], num_prompt_tokens: int, num_answer_tokens: int
) -> list[SampleShape]:
    """A sample with any number of images; those after the first count as samples without text."""
    first = image_sizes[0] if image_sizes else None
    rest = [SampleShape(size, 0, 0) for size in image_sizes[1:]]
    return [SampleShape(first, num_prompt_tokens, num_answer_tokens), *rest]


@dataclass(frozen=True)
class StepFlops:
    """Operations of one forward and backward pass, by part."""

    vision: float
    language: float
    head: float
    router: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.vision + self.language + self.head + self.router


def step_flops(
    stage: int,
    samples: Sequence[SampleShape],
    config: AvgLlavaConfig,
    plain: bool,
    stored_feedback: bool = False,
    draws_level: bool = False,
    adapters: Mapping[Part, AdapterShape] | None = None,
) -> StepFlops:
    """Operations of a step of a stage on a micro-batch.

    Args:
        stage: 1 to 4.
        samples: the micro-batch.
        config: a model with a language model of Llama's shape.
        plain: as the plain loop does it: images encoded for every level (and for the router), all samples as long as
            the longest, attention under a mask, logits of every token.
        stored_feedback: the language model's answers are known, as they are to stage 4 with a feedback store.
        draws_level: stage 4 learns from the loss at one level, each of which is drawn as often as any other.
        adapters: of LoRA, in the parts that are trained through them.
    """
    trains = STAGES[stage].trains
    levels = config.granularities if stage > 2 else config.granularities[-1:]
    # Forward passes that a part's forward and backward passes are worth.
    adapters = adapters or {}
    vision_passes = (2 if "vision" in adapters else 3) if "vision" in trains else 1
    is_whole = "llm" in trains and "llm" not in adapters
    language_passes = 3 if is_whole else (2 if "projector" in trains or draws_level else 1)
    crops = sum(num_crops(sample.image_size, config) for sample in samples if sample.image_size is not None)
    encodings = (len(levels) + (1 if stage == 4 else 0)) if plain else 1
    language = head = adapted_tokens = 0.0
    for level in () if stored_feedback else levels:
        # Texts are the same at all levels and go through the language model once, if not in the plain loop.
        is_last = draws_level or level == levels[-1]
        seen = [each for each in samples if plain or each.image_size is not None or is_last]
        lengths = [sample.length(level, config) for sample in seen]
        if plain:
            lengths = [max(lengths)] * len(lengths)
        adapted_tokens += sum(lengths)
        language += language_flops(lengths, config, masked=plain and len(samples) > 1)
        answers = sum(sample.num_answer_tokens for sample in seen)
        head += head_flops(sum(lengths) if plain else answers, config)
    if draws_level:
        language, head = language / len(levels), head / len(levels)
    used = config.num_vision_layers / config.vision_config.num_hidden_layers
    rows = encodings * crops * (config.num_patches_per_side**2 + 1) * used
    return StepFlops(
        vision=vision_passes * encodings * vision_flops(crops, config) + _adapter_flops(rows, adapters.get("vision")),
        language=language_passes * language + _adapter_flops(adapted_tokens, adapters.get("llm")),
        head=language_passes * head,
        router=3 * router_flops(crops, config) if "router" in trains else 0.0,
    )


def _adapter_flops(tokens: float, shape: AdapterShape | None) -> float:
    """Forward and backward pass of tokens through the adapters of a part."""
    return 0.0 if shape is None else 3 * 2.0 * tokens * shape.parameters


def sequence_lengths(stage: int, samples: Sequence[SampleShape], config: AvgLlavaConfig) -> list[int]:
    """Tokens, text and visual, of every sequence that a stage sends through the language model at all its levels."""
    finest = config.granularities[-1]
    return [
        min(sample.length(level, config), config.max_sequence_length)
        for level in (config.granularities if stage > 2 else [finest])
        for sample in samples
        if sample.image_size is not None or level == finest
    ]


def vision_flops(crops: int, config: AvgLlavaConfig, whole_tower: bool = False) -> float:
    """Forward pass of C crops through the tower, up to the layer that is used or as a whole, and the projector."""
    vision, width = config.vision_config, config.text_config.hidden_size
    patches, own = config.num_patches_per_side**2, vision.hidden_size
    embedding = patches * vision.num_channels * vision.patch_size**2 * own
    layer = (patches + 1) * (4 * own**2 + 2 * own * vision.intermediate_size) + 2 * (patches + 1) ** 2 * own
    projector = patches * (own * width + width**2)
    return (
        2.0
        * crops
        * (embedding + (vision.num_hidden_layers if whole_tower else config.num_vision_layers) * layer + projector)
    )


def language_flops(lengths: Sequence[int], config: AvgLlavaConfig, masked: bool = False) -> float:
    """Forward pass of sequences of T tokens each through the layers of the language model, without its head.

    Args:
        lengths: tokens of each sequence.
        config: the model.
        masked: attention computes every pair of tokens and masks half of them, as under a padding mask.
    """
    text = config.text_config
    head_width = text.hidden_size // text.num_attention_heads
    attention = text.hidden_size**2 * 2 + 2 * text.hidden_size * text.num_key_value_heads * head_width
    per_token = attention + 3 * text.hidden_size * text.intermediate_size
    pairs = sum(length**2 for length in lengths) * (1.0 if masked else 0.5)
    return 2.0 * text.num_hidden_layers * (sum(lengths) * per_token + 2 * pairs * text.hidden_size)


def head_flops(tokens: int, config: AvgLlavaConfig) -> float:
    """Forward pass of the language model's head."""
    return 2.0 * tokens * config.text_config.hidden_size * config.text_config.vocab_size


def router_flops(crops: int, config: AvgLlavaConfig) -> float:
    """Forward pass of C crops through the router, which attends over the tokens of a crop."""
    router, width = config.router_config, config.text_config.hidden_size
    tokens = sum(config.granularities) + router.num_text_tokens
    feed_forward = 2 * width * (router.intermediate_size or width)
    per_token = 4 * width**2 + feed_forward + width**2 + width * len(config.granularities)
    return 2.0 * crops * (tokens * per_token + 2 * tokens**2 * width)
