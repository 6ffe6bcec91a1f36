"""Granularity scaler: average-pools each crop's grid of visual tokens into a pyramid of coarser grids.

Shapes: C crops, S patches per side, R rows, K columns, D width. Tokens are row-major. Pure functions.
"""

import torch.nn.functional as F
from torch import Tensor


def granularity_pyramid(side: int, num_levels: int) -> list[int]:
    """Tokens per crop of the `num_levels` finest levels, coarse to fine; fewer where the grid cannot be halved on."""
    return [rows * columns for rows, columns in _grids(side)][:num_levels][::-1]


def token_grid(side: int, granularity: int) -> tuple[int, int]:
    """(rows, columns) of the grid that holds `granularity` tokens of a crop of `side` x `side` patches.

    Raises:
        ValueError: no level of the pyramid has that many tokens.
    """
    grids = {rows * columns: (rows, columns) for rows, columns in _grids(side)}
    if granularity not in grids:
        raise ValueError(f"granularity {granularity} is no level of a {side}x{side} grid; its levels are {list(grids)}")
    return grids[granularity]


def _grids(side: int) -> list[tuple[int, int]]:
    """Grids of the whole pyramid, fine to coarse: 24x24, 24x12, 12x12, 12x6, 6x6, ...

    Halving alternates and takes the width first (paper section 3.1; order as in the released weights).
    """
    grids = [(side, side)]
    while True:
        rows, columns = grids[-1]
        halved, kept = (columns, rows) if rows == columns else (rows, columns)
        if halved % 2:
            return grids
        grids.append((kept, halved // 2) if rows == columns else (halved // 2, kept))


def pool_tokens(tokens: Tensor, side: int, granularity: int) -> Tensor:
    """Average-pools `tokens` (C, S*S, D) of `side` = S to (C, granularity, D).

    Raises:
        ValueError: the token count is not that of the grid, or there is no such level.
    """
    if tokens.shape[1] != side * side:
        raise ValueError(f"expected {side * side} tokens per crop ({side}x{side}), got {tokens.shape[1]}")
    rows, columns = token_grid(side, granularity)
    if granularity == side * side:
        return tokens
    grid = tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (C, D, S, S), the memory format "channels last"
    pooled = F.avg_pool2d(grid, (side // rows, side // columns))  # (C, D, R, K)
    return pooled.permute(0, 2, 3, 1).flatten(1, 2)  # (C, R*K, D)


def spread_tokens(tokens: Tensor, side: int) -> Tensor:
    """Repeats each of a level's tokens (C, granularity, D) over its cell of the grid: (C, S*S, D).

    Pooled to their level again, they are what they were, up to rounding.

    Raises:
        ValueError: there is no such level.
    """
    rows, columns = token_grid(side, tokens.shape[1])
    grid = tokens.unflatten(1, (rows, columns))  # (C, R, K, D)
    grid = grid.repeat_interleave(side // rows, dim=1).repeat_interleave(side // columns, dim=2)  # (C, S, S, D)
    return grid.flatten(1, 2)


__all__ = ["granularity_pyramid", "pool_tokens", "spread_tokens", "token_grid"]
