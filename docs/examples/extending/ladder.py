"""A ladder of squares: both sides are halved at every level, and a cell's token is its maximum, not its mean.

Once this file is imported, `pooling_ladder: squares` in a model's configuration (in training, stage 1's
`--model.pooling_ladder squares`) selects it. For 24 x 24 tokens per crop the levels have 9, 36, 144 and 576 tokens.
"""

import torch.nn.functional as F
from torch import Tensor

from avg_llava.model.scaler import LADDERS, Ladder


class SquareLadder(Ladder):
    """S x S, S/2 x S/2, S/4 x S/4, ... until the side is odd; tokens are max-pooled."""

    def grids(self) -> list[tuple[int, int]]:
        sides = [self.side]
        while sides[-1] % 2 == 0:
            sides.append(sides[-1] // 2)
        return [(side, side) for side in sides]

    def pool(self, tokens: Tensor, granularity: int) -> Tensor:
        rows, _ = self.grid(granularity)
        grid = tokens.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)  # (C, D, S, S)
        return F.max_pool2d(grid, self.side // rows).permute(0, 2, 3, 1).flatten(1, 2)  # (C, granularity, D)


LADDERS["squares"] = SquareLadder
