"""Collates samples of a data set into a padded batch.

Shapes: B samples, L length, N images of the batch (sample after sample), P crops of one image, S crop side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from avg_llava.model.splice import IGNORE_INDEX


@dataclass(frozen=True)
class Collator:
    """Pads on the right: ids with `pad_token_id`, labels with -100, images with zero crops.

    Returns `input_ids`, `attention_mask`, `labels` (B, L), `index` (B,), the samples' indices in the data set, and, if
    the batch has images, `pixel_values` (N, P_max, 3, S, S) and `image_sizes` (N, 2) as (height, width). The mask
    follows the lengths, so a text token equal to `pad_token_id` stays visible.
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
