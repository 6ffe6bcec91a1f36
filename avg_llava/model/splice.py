"""Splicing: replaces each image placeholder of a batch by the visual tokens of the image.

Shapes: B samples, L tokens with one placeholder per image, N images in the batch (sample after sample), V_n visual
tokens of image n, D width, L' tokens after splicing. Pure functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of unsupervised positions, as in transformers

PaddingSide = Literal["left", "right"]


@dataclass
class SplicedInputs:
    """Inputs of the language model.

    Attributes:
        inputs_embeds: (B, L', D), zero at padding.
        attention_mask: (B, L') int64, 0 at padding.
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
    """Raises ValueError unless there are as many placeholders, True in `is_image` (B, L), as images."""
    if int(is_image.sum()) != num_images:
        raise ValueError(
            f"the batch has {num_images} images but its samples hold {is_image.sum(1).tolist()} image placeholders; "
            "each image needs exactly one"
        )


class JoinGradients(torch.autograd.Function):
    """Identity on several tensors whose gradients are returned together, zero for unused tensors.

    ZeRO averages gradients over processes in the order in which the backward pass produces them. Without this function
    the order depends on the positions of a batch's images and on whether there are any, so that processes with
    different batches would average gradients of different parameters.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the tensors unchanged."""
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients unchanged; PyTorch passes zeros for unused tensors."""
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
    """Replaces placeholders by visual tokens, and pads the batch anew.

    Args:
        text_embeds: (B, L, D); rows of placeholders are ignored.
        is_image: (B, L) bool, True at placeholders.
        attention_mask: (B, L), 0 at padding. Indices are computed from it and `is_image`: these two should be on the
            CPU even if the embeddings are on a GPU.
        visual_tokens: N tensors (V_n, D), in the order of the placeholders.
        labels: (B, L) or None. Visual tokens get `IGNORE_INDEX`.
        padding_side: Side on which shorter samples are padded.
        max_length: Truncates each sample to its first `max_length` tokens; None: no truncation.

    Raises:
        ValueError: The batch has more or fewer placeholders than images.
    """
    num_samples, length, width = text_embeds.shape
    real = attention_mask.bool()
    is_image = is_image & real
    check_placeholders(is_image, len(visual_tokens))
    device = real.device
    num_visual_tokens = torch.tensor([len(tokens) for tokens in visual_tokens], dtype=torch.long, device=device)

    # Number of output positions of each input position, and the first of them.
    sizes = real.long()  # (B, L)
    sizes[is_image] = num_visual_tokens
    lengths = sizes.sum(1)  # (B,)
    if max_length is not None:
        lengths = lengths.clamp(max=max_length)
    new_length = int(lengths.max()) if num_samples else 0
    starts = sizes.cumsum(1) - sizes  # (B, L)

    # `source`: text embeddings, visual tokens, a row of padding. `origin` (B, L'): row of `source` at each position.
    source = torch.cat([text_embeds.reshape(-1, width), *visual_tokens, text_embeds.new_zeros(1, width)])
    origin = torch.full((num_samples, new_length), len(source) - 1, device=device)
    sample, position = torch.nonzero(real & ~is_image, as_tuple=True)
    target = starts[sample, position]
    origin_rows, origin_targets, origin_values = [sample], [target], [sample * length + position]
    visual_start = num_samples * length
    for count, (owner, index) in zip(num_visual_tokens.tolist(), torch.nonzero(is_image).tolist(), strict=True):
        steps = torch.arange(count, device=device)
        origin_rows.append(torch.full_like(steps, owner))
        origin_targets.append(starts[owner, index] + steps)
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
