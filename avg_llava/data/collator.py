"""Samples of a data set into a padded batch.

Shapes: B samples, L length, N images of the batch (sample after sample), P crops of one image, S crop side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from avg_llava.data.templates import IGNORE_INDEX


@dataclass(frozen=True)
class Collator:
    """Pads on the right: ids with `pad_token_id`, labels with -100, images with zero crops at the end.

    Gives `input_ids`, `attention_mask`, `labels` (B, L), `index` (B,), the positions in the data set, and, unless no
    sample of the batch has an image, `pixel_values` (N, P_max, 3, S, S) and `image_sizes` (N, 2) as (height, width).
    The mask follows the lengths, so an id equal to `pad_token_id` inside a text stays visible.
    """

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {
            "input_ids": pad_sequence([item["input_ids"] for item in items], True, self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(item["input_ids"]) for item in items], True, 0),
            "labels": pad_sequence([item["labels"] for item in items], True, IGNORE_INDEX),
            "index": torch.tensor([item["index"] for item in items]),
        }
        crops = [image for item in items for image in item["pixel_values"]]
        if crops:
            batch["pixel_values"] = pad_sequence(crops, True, 0.0)
            batch["image_sizes"] = torch.cat([item["image_sizes"] for item in items])
        return batch


__all__ = ["Collator"]
