"""Budgets on visual tokens, and the selection of levels within them.

Shapes: N images, G levels, coarse to fine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.configuration import AvgLlavaConfig


class BudgetError(ValueError):
    """A budget is invalid, or the images of a prompt do not fit into it."""


@dataclass(frozen=True)
class Budget:
    """Chooses between routing and a forced level, and limits the visual tokens of one request.

    Attributes:
        granularity: Visual tokens per crop for every image; None routes.
        token_cost: Price of the router's choice in nats per doubling of visual tokens; 0 is the paper's argmax.
        max_visual_tokens: Limit on the visual tokens, newlines included, of all images of the request together.

    Raises:
        BudgetError: `token_cost` is negative, not finite or given with `granularity`; or the limit is below 1.
    """

    granularity: int | None = None
    token_cost: float = 0.0
    max_visual_tokens: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.token_cost) and self.token_cost >= 0):
            raise BudgetError(f"token_cost is a price in nats, 0 or more, not {self.token_cost}")
        if self.max_visual_tokens is not None and self.max_visual_tokens < 1:
            raise BudgetError(f"max_visual_tokens must be at least 1, got {self.max_visual_tokens}")
        if self.granularity is not None and self.token_cost:
            raise BudgetError("token_cost is the router's price, but granularity forces a level: give one of the two")


def select_levels(
    config: AvgLlavaConfig,
    image_sizes: Sequence[Sequence[tuple[int, int]]],
    budgets: Sequence[Budget],
    values: Sequence[Sequence[float]] | None,
) -> list[int]:
    """Selects the level of each image: the one that its budget forces, else the most valuable within the limit.

    Args:
        config: Configuration of the model, with its levels.
        image_sizes: For each request (height, width) in pixels of its images.
        budgets: One for each request.
        values: (N, G) values of the levels, image after image; None counts all levels as equal.

    Returns:
        N numbers of visual tokens per crop.

    Raises:
        BudgetError: The images of a request do not fit into its limit.
    """
    selected: list[int] = []
    for budget, sizes in zip(budgets, image_sizes, strict=True):
        levels = config.granularities
        if budget.granularity is not None:
            config.check_level(budget.granularity)
            levels = [budget.granularity]
        rows: Sequence[Sequence[float]] = [[0.0] * len(levels)] * len(sizes)
        if values is not None and budget.granularity is None:
            rows = values[len(selected) : len(selected) + len(sizes)]
        if budget.max_visual_tokens is None:
            indices = [row.index(max(row)) for row in rows]
        else:
            tokens = [[num_visual_tokens(size, level, config) for level in levels] for size in sizes]
            indices = best_levels(rows, tokens, budget.max_visual_tokens)
        selected += [levels[index] for index in indices]
    return selected


def best_levels(values: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]], max_tokens: int) -> list[int]:
    """Levels of a request's images with the highest sum of values whose tokens stay within a limit.

    A dynamic program over images: it keeps, for each total number of tokens, the best choice so far, and drops choices
    that are not better than one with fewer tokens. Ties go to the choice with the fewest tokens.

    Args:
        values: (N, G) value of each level of each image.
        tokens: (N, G) visual tokens of each image at each level.
        max_tokens: Limit on the sum of tokens.

    Returns:
        N indices of levels.

    Raises:
        BudgetError: The images exceed the limit at their coarsest level.
    """
    frontier: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]  # (tokens, value, levels), both increasing
    for level_values, counts in zip(values, tokens, strict=True):
        candidates = [
            (total + count, value + more, (*levels, level))
            for total, value, levels in frontier
            for level, (count, more) in enumerate(zip(counts, level_values, strict=True))
            if total + count <= max_tokens
        ]
        frontier = []
        for candidate in sorted(candidates, key=lambda candidate: (candidate[0], -candidate[1])):
            if not frontier or candidate[1] > frontier[-1][1]:
                frontier.append(candidate)
    if not frontier:
        least = sum(min(counts) for counts in tokens)
        raise BudgetError(
            f"max_visual_tokens {max_tokens} is too low: at the coarsest level the images take {least} visual tokens; "
            "raise the limit, or use fewer or smaller images"
        )
    return list(frontier[-1][2])
