"""Granularity scaler: pooling ladders, which reduce each crop's grid of visual tokens to coarser grids.

Shapes: C crops, S patches per side, R rows, K columns, D width. Tokens are row-major. Pure functions of tensors.
"""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor


class Ladder(ABC):
    """Pooling ladder: the levels of a crop of S x S tokens, and how tokens are pooled to each of them.

    A level is a grid of R x K tokens. It is named by its granularity, the number R * K of its tokens, so no two grids
    of a ladder may have equally many. Cells are ceil(S / R) patches high and ceil(S / K) wide. They start at the top
    left, as the patches of a convolution do, so that those of the last row and column are smaller where R or K does not
    divide S: 27 patches are thirteen cells of 2 and one of 1, or six of 4 and one of 3.

    To add a ladder, subclass this class, implement :meth:`grids`, and add the subclass to :data:`LADDERS`. A model
    uses the ladder that the field `pooling_ladder` of its configuration names; `config.ladder` is an instance of it.
    Tokens are averaged over the cells of the grid. A ladder that pools otherwise overrides :meth:`pool`; it has no
    weights, and must satisfy `pool(crops + spread(tokens)) == pool(crops) + tokens` up to rounding, on which the
    Gumbel objective relies. `docs/examples/extending/ladder.py` is a complete example.

    Args:
        side: S.

    Raises:
        ValueError: A grid has rows or columns that no size of cell gives, or two grids have equally many tokens.
    """

    def __init__(self, side: int):
        self.side = side
        grids = self.grids()
        self._grids = {rows * columns: (rows, columns) for rows, columns in grids}
        possible = {-(-side // cell) for cell in range(1, side + 1)}
        if len(self._grids) != len(grids) or any(not possible.issuperset(grid) for grid in grids):
            raise ValueError(
                f"{type(self).__name__}: grids must have distinct numbers of tokens, and rows and columns among "
                f"{sorted(possible)} for {side} patches per side; got {grids}"
            )

    @abstractmethod
    def grids(self) -> list[tuple[int, int]]:
        """(R, K) of every level for crops of `self.side` x `self.side` tokens, fine to coarse."""

    @property
    def granularities(self) -> list[int]:
        """Tokens per crop of every level, coarse to fine."""
        return sorted(self._grids)

    def grid(self, granularity: int) -> tuple[int, int]:
        """(R, K) of the level with `granularity` tokens.

        Raises:
            ValueError: There is no such level.
        """
        if granularity not in self._grids:
            raise ValueError(
                f"granularity {granularity} is no level of a {self.side}x{self.side} grid; its levels are "
                f"{self.granularities}"
            )
        return self._grids[granularity]

    def cell(self, granularity: int) -> tuple[int, int]:
        """(height, width) in patches of a cell of a level; those at the bottom and at the right may be smaller."""
        rows, columns = self.grid(granularity)
        return -(-self.side // rows), -(-self.side // columns)

    def pool(self, tokens: Tensor, granularity: int) -> Tensor:
        """Pools `tokens` (C, S*S, D) to (C, granularity, D).

        Raises:
            ValueError: There are not S*S tokens, or there is no such level.
        """
        side = self.side
        if tokens.shape[1] != side * side:
            raise ValueError(f"expected {side * side} tokens per crop ({side}x{side}), got {tokens.shape[1]}")
        cell = self.cell(granularity)
        if granularity == side * side:
            return tokens
        grid = tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (C, D, S, S), memory format "channels last"
        pooled = F.avg_pool2d(grid, cell, ceil_mode=True)  # (C, D, R, K), means of the patches that a cell has
        return pooled.permute(0, 2, 3, 1).flatten(1, 2)  # (C, R*K, D)

    def spread(self, tokens: Tensor) -> Tensor:
        """Repeats each token of a level (C, granularity, D) over its cell of the grid: (C, S*S, D).

        Pooling the result to the same level gives `tokens` again, up to rounding.

        Raises:
            ValueError: There is no level with that many tokens.
        """
        rows, columns = self.grid(tokens.shape[1])
        height, width = self.cell(tokens.shape[1])
        grid = tokens.unflatten(1, (rows, columns))  # (C, R, K, D)
        grid = grid.repeat_interleave(height, dim=1).repeat_interleave(width, dim=2)
        return grid[:, : self.side, : self.side].flatten(1, 2)  # (C, S*S, D)


class WidthFirstLadder(Ladder):
    """The paper's ladder: width and height are halved in turn, width first (section 3.1; order of the released code).

    24x24, 24x12, 12x12, 12x6, 6x6, ... down to 1x1. A half is rounded up: 27x27, 27x14, 14x14, 14x7, 7x7, ...
    """

    def grids(self) -> list[tuple[int, int]]:
        """(R, K), fine to coarse."""
        grids = [(self.side, self.side)]
        while grids[-1] != (1, 1):
            rows, columns = grids[-1]
            grids.append((rows, -(-columns // 2)) if rows == columns else (columns, columns))
        return grids


LADDERS: dict[str, type[Ladder]] = {"width_first": WidthFirstLadder}
"""Pooling ladders by name, the value of the configuration field `pooling_ladder`."""
