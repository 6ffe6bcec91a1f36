"""A router without attention: an MLP over the mean visual token of each crop and the mean instruction token.

Once this file is imported, `router_config.kind: mean` (in training, `--model.router '{kind: mean}'`) selects it.
"""

import torch
from torch import Tensor, nn

from avg_llava import AvgLlavaConfig
from avg_llava.model.router import ROUTERS, Router


class MeanRouter(Router):
    """Scores each crop by an MLP over [mean visual token, mean instruction token]; an image's scores are their mean."""

    def __init__(self, config: AvgLlavaConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, len(config.granularities)))

    def score(self, crops: Tensor, num_crops: list[int], text: Tensor, text_mask: Tensor) -> Tensor:
        mask = text_mask[..., None].to(text)  # (N, M, 1)
        instruction = (text * mask).sum(1) / mask.sum(1).clamp(min=1)  # (N, D)
        counts = torch.tensor(num_crops, device=crops.device)
        inputs = torch.cat([crops.mean(1), instruction.repeat_interleave(counts, dim=0)], dim=-1)  # (C, 2D)
        scores = self.mlp(inputs).split(num_crops)  # N tensors (P, G)
        return torch.stack([of_image.mean(0) for of_image in scores])  # (N, G)

    @classmethod
    def forward_flops(cls, num_crops: int, config: AvgLlavaConfig) -> float:
        width = config.text_config.hidden_size
        return 2.0 * num_crops * (2 * width * width + width * len(config.granularities))

    @classmethod
    def activation_bytes(cls, num_crops: int, config: AvgLlavaConfig) -> float:
        """The inputs (2D) of the first layer, and the input and the output (D each) of the activation, in float32."""
        return 4.0 * num_crops * 4 * config.text_config.hidden_size


ROUTERS["mean"] = MeanRouter
