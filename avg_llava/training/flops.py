"""Floating-point operations of a training step, counted from shapes.

A multiply-add counts as two operations. A backward pass costs twice its forward pass, or as much as it where a part is
frozen but gradients flow through it. Norms, activation functions, softmaxes and recomputation are not counted.

Shapes: C crops, T tokens of a sequence.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from avg_llava.model.anyres import num_crops, num_visual_tokens
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.language import language_parts
from avg_llava.model.router import find_router
from avg_llava.training.lora import AdapterShape
from avg_llava.training.stages import Part, Passes


@dataclass(frozen=True)
class SampleShape:
    """The properties of a sample that determine its cost.

    Attributes:
        image_size: (height, width) in pixels, or None without an image.
        num_prompt_tokens: Text tokens that are not supervised, without the image placeholder.
        num_answer_tokens: Supervised tokens, at the end.
    """

    image_size: tuple[int, int] | None
    num_prompt_tokens: int
    num_answer_tokens: int

    def length(self, granularity: int, config: AvgLlavaConfig) -> int:
        """Sequence length with the image at a level."""
        visual = 0 if self.image_size is None else num_visual_tokens(self.image_size, granularity, config)
        return visual + self.num_prompt_tokens + self.num_answer_tokens


def shapes_of(
    image_sizes: Sequence[tuple[int, int]], num_prompt_tokens: int, num_answer_tokens: int
) -> list[SampleShape]:
    """Shapes of a sample with any number of images; images after the first count as samples without text."""
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
        """Sum over the parts."""
        return self.vision + self.language + self.head + self.router


def step_flops(
    trains: Collection[Part],
    passes: Passes,
    samples: Sequence[SampleShape],
    config: AvgLlavaConfig,
    reference: bool = False,
    adapters: Mapping[Part, AdapterShape] | None = None,
) -> StepFlops:
    """Operations of a forward and backward pass over a micro-batch of a model with a Llama-like language model.

    Args:
        passes: With `sampled`, all levels are assumed equally probable.
        reference: Count the reference loop (`bench/`), which encodes images anew for every level and for the router,
            pads all samples to the longest, computes attention under a mask and logits of every token.
        adapters: LoRA adapters, by part.
    """
    adapters = adapters or {}
    levels = passes.granularities(config.granularities)
    # Cost of forward and backward pass together, in forward passes.
    vision_factor = (2 if "vision" in adapters else 3) if "vision" in trains else 1
    is_whole = "llm" in trains and "llm" not in adapters
    language_factor = (3 if is_whole else 2) if passes.language_backward else 1
    crops = sum(num_crops(sample.image_size, config) for sample in samples if sample.image_size is not None)
    encodings = len(levels) + passes.router if reference else 1
    language = head = adapted_tokens = 0.0
    for level in levels:
        # The reference loop repeats samples without images at every level.
        is_last = passes.sampled or level == levels[-1]
        batch = [sample for sample in samples if reference or sample.image_size is not None or is_last]
        lengths = [sample.length(level, config) for sample in batch]
        if reference:
            lengths = [max(lengths)] * len(lengths)
        adapted_tokens += sum(lengths)
        language += language_flops(lengths, config, masked=reference and len(samples) > 1)
        answers = sum(sample.num_answer_tokens for sample in batch)
        head += head_flops(sum(lengths) if reference else answers, config)
    if passes.sampled:
        language, head = language / len(levels), head / len(levels)

    def adapter_flops(part: Part, tokens: float) -> float:
        return 3 * 2.0 * tokens * adapters[part].parameters if part in adapters else 0.0

    used = config.num_vision_layers / config.vision_config.num_hidden_layers
    vision_tokens = encodings * crops * (config.num_patches_per_side**2 + config.num_prefix_tokens) * used
    return StepFlops(
        vision=vision_factor * encodings * vision_flops(crops, config) + adapter_flops("vision", vision_tokens),
        language=language_factor * language + adapter_flops("llm", adapted_tokens),
        head=language_factor * head,
        router=(3 if "router" in trains else 1) * router_flops(crops, config) if passes.router else 0.0,
    )


def sequence_lengths(passes: Passes, samples: Sequence[SampleShape], config: AvgLlavaConfig) -> list[int]:
    """Lengths in tokens of all sequences that go through the language model, over all levels of `passes`."""
    levels = passes.granularities(config.granularities)
    return [
        min(sample.length(level, config), config.max_sequence_length)
        for level in levels
        for sample in samples
        if sample.image_size is not None or level == levels[-1]
    ]


def vision_flops(crops: int, config: AvgLlavaConfig, whole_tower: bool = False) -> float:
    """Forward pass of C crops through vision tower and projector.

    Args:
        whole_tower: Count the layers after the one whose features are used, too.
    """
    vision, width = config.vision_config, config.text_config.hidden_size
    patches, vision_width = config.num_patches_per_side**2, vision.hidden_size
    embedding = patches * vision.num_channels * vision.patch_size**2 * vision_width
    feed_forward = config.tower.feed_forward(vision)
    matrices = 4 * vision_width**2 + feed_forward.matrices * vision_width * feed_forward.width
    rows = patches + config.num_prefix_tokens
    layer = rows * matrices + 2 * rows**2 * vision_width
    num_layers = vision.num_hidden_layers if whole_tower else config.num_vision_layers
    projector = patches * (vision_width * width + width**2)
    return 2.0 * crops * (embedding + num_layers * layer + projector)


def language_flops(lengths: Sequence[int], config: AvgLlavaConfig, masked: bool = False) -> float:
    """Forward pass of sequences of T tokens each through the layers of the language model, without its head.

    Experts of a layer are counted as if all of them saw every token.

    Args:
        lengths: T of each sequence.
        masked: Attention computes all pairs of tokens and masks half of them, as under a padding mask.
    """
    parts = language_parts(config.text_config)
    pairs = sum(length**2 for length in lengths) * (1.0 if masked else 0.5)
    attention = config.text_config.num_hidden_layers * 2 * pairs * parts.attention_width
    return 2.0 * (sum(lengths) * parts.layer_weights + attention)


def head_flops(tokens: int, config: AvgLlavaConfig) -> float:
    """Forward pass of tokens through the language model's head."""
    return 2.0 * tokens * config.text_config.hidden_size * config.text_config.vocab_size


def router_flops(crops: int, config: AvgLlavaConfig) -> float:
    """Forward pass of C crops through the router."""
    return find_router(config).forward_flops(crops, config)
