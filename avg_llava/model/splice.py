"""Splicing: each image placeholder of a batch is replaced by that image's visual tokens.

Shapes: B samples, L tokens with one placeholder per image, N images in the batch (sample after sample), V_n visual
tokens of image n, D width, L' tokens after splicing. Pure functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of positions that the loss leaves out, as in transformers

PaddingSide = Literal["left", "right"]


@dataclass
class SplicedInputs:
    """What the language model gets to see.

    Attributes:
        inputs_embeds: (B, L', D); padding rows are zero.
        attention_mask: (B, L') int64, 1 where there is a token.
        position_ids: (B, L') int64, counted from each sample's first token.
        labels: (B, L') or None.
        num_visual_tokens: (N,) int64, visual tokens of each image, newlines included.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    num_visual_tokens: Tensor


def check_placeholders(is_image: Tensor, num_images: int) -> None:
    """Raises ValueError unless the batch's placeholders, `is_image` (B, L), are as many as its images."""
    if int(is_image.sum()) != num_images:
        raise ValueError(
            f"the batch has {num_images} images but its samples hold {is_image.sum(1).tolist()} image placeholders; "
            "each image needs exactly one"
        )


class JoinGradients(torch.autograd.Function):
    """Identity on several tensors whose gradients leave together, those of unused ones as zeros.

    ZeRO averages gradients over the ranks in the order in which the backward pass makes them. Without this, that order
    would depend on where a batch's images enter its prompts and on whether there are any, and ranks with different
    batches would add up gradients of different parameters.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(...) each, returned as they are."""
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """One gradient per tensor; PyTorch makes the zeros."""
        return gradients


def splice_visual_tokens(
    text_embeds: Tensor,
    is_image: Tensor,
    attention_mask: Tensor,
    visual_tokens: Sequence[Tensor],
    labels: Tensor | None = None,
    padding_side: PaddingSide = "right",
    max_length: int | None = None,
) -> SplicedInputs:
    """Replaces placeholders by visual tokens, drops the batch's padding and pads anew.

    Args:
        text_embeds: (B, L, D); rows at placeholders are not used.
        is_image: (B, L) bool, True at placeholders.
        attention_mask: (B, L), 0 at padding. It and `is_image` decide where everything goes, in many small numbers: if
            the embeddings are on a GPU, give these two on the host.
        visual_tokens: N tensors (V_n, D), in the order of the placeholders.
        labels: (B, L) or None. Visual tokens get `IGNORE_INDEX`.
        padding_side: Side on which shorter samples are padded.
        max_length: Cuts each sample to its first `max_length` tokens; None cuts nothing.

    Raises:
        ValueError: the batch has more or fewer placeholders than images.
    """
    num_samples, length, width = text_embeds.shape
    real = attention_mask.bool()
    is_image = is_image & real
    check_placeholders(is_image, len(visual_tokens))
    layout = real.device
    num_visual_tokens = torch.tensor([len(tokens) for tokens in visual_tokens], dtype=torch.long, device=layout)

    # How many places each position of the old batch takes in the new one, and where they start.
    places = real.long()  # (B, L)
    places[is_image] = num_visual_tokens
    lengths = places.sum(1)  # (B,)
    if max_length is not None:
        lengths = lengths.clamp(max=max_length)
    new_length = int(lengths.max()) if num_samples else 0
    starts = places.cumsum(1) - places  # (B, L)

    # `source` holds every row that the new batch can need; `origin` says which one goes where (last row: padding).
    source = torch.cat([text_embeds.reshape(-1, width), *visual_tokens, text_embeds.new_zeros(1, width)])
    origin = torch.full((num_samples, new_length), len(source) - 1, device=layout)
    sample, position = torch.nonzero(real & ~is_image, as_tuple=True)
    target = starts[sample, position]
    origin_rows, origin_targets, origin_values = [sample], [target], [sample * length + position]
    visual_start = num_samples * length
    for count, (owner, place) in zip(num_visual_tokens.tolist(), torch.nonzero(is_image).tolist(), strict=True):
        steps = torch.arange(count, device=layout)
        origin_rows.append(torch.full_like(steps, owner))
        origin_targets.append(starts[owner, place] + steps)
        origin_values.append(visual_start + steps)
        visual_start += count
    rows, targets, values = torch.cat(origin_rows), torch.cat(origin_targets), torch.cat(origin_values)
    inside = targets < lengths[rows]
    rows, targets, values = rows[inside], targets[inside], values[inside]
    if padding_side == "left":
        targets = targets + (new_length - lengths)[rows]
    origin[rows, targets] = values
    mask = torch.zeros_like(origin)
    mask[rows, targets] = 1

    origin, mask = origin.to(text_embeds.device), mask.to(text_embeds.device)
    spliced_labels = None
    if labels is not None:
        ignored = labels.new_full((len(source) - labels.numel(),), IGNORE_INDEX)
        spliced_labels = torch.cat([labels.reshape(-1), ignored])[origin]
    return SplicedInputs(
        inputs_embeds=source.index_select(0, origin.flatten()).view(num_samples, new_length, width),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        labels=spliced_labels,
        num_visual_tokens=num_visual_tokens.to(text_embeds.device),
    )


__all__ = [
    "IGNORE_INDEX",
    "JoinGradients",
    "PaddingSide",
    "SplicedInputs",
    "check_placeholders",
    "splice_visual_tokens",
]
