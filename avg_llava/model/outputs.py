"""What the model's steps hand to one another and to the caller. Shape letters as in modeling.py."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class ImageFeatures:
    """One encoding of a batch's images, from which every level is pooled.

    Attributes:
        crops: (C, T, D) projected finest tokens.
        num_crops: Crops of each image; they add up to C. Empty for the blank crop of a batch without images.
        image_sizes: (height, width) of each image in pixels.
    """

    crops: Tensor
    num_crops: list[int]
    image_sizes: list[tuple[int, int]]

    @property
    def is_blank(self) -> bool:
        """True where the only crop stands for a batch without images; it must count with weight 0."""
        return not self.num_crops

    def of_images(self, numbers: Sequence[int]) -> "ImageFeatures":
        """The features of some of the images."""
        crops = self.crops.split(self.num_crops)
        return ImageFeatures(
            torch.cat([self.crops[:0], *(crops[number] for number in numbers)]),
            [self.num_crops[number] for number in numbers],
            [self.image_sizes[number] for number in numbers],
        )


@dataclass
class AvgLlavaOutput(ModelOutput):
    """Output of :class:`AvgLlavaForConditionalGeneration`.

    Attributes:
        loss: Mean cross-entropy over supervised tokens, if labels were given.
        logits: (B, L', vocabulary).
        past_key_values: Cache of the language model.
        hidden_states: As the language model gives them.
        attentions: As the language model gives them.
        granularity: (N,) visual tokens per crop at the level of each image.
        router_logits: (N, G), levels coarse to fine; None where the level was forced.
        num_visual_tokens: (N,) visual tokens of each image, newlines included.
        labels: (B, L') labels that `logits` are scored against, if labels were given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    granularity: Tensor | None = None
    router_logits: Tensor | None = None
    num_visual_tokens: Tensor | None = None
    labels: Tensor | None = None


__all__ = ["AvgLlavaOutput", "ImageFeatures"]
