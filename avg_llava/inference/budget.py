"""What visual tokens may cost: who chooses an image's level, at which price, and below which limit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


class BudgetError(ValueError):
    """A budget that makes no sense, or that a prompt's images cannot meet."""


@dataclass(frozen=True)
class Budget:
    """How the levels of a prompt's images are found.

    Attributes:
        granularity: Visual tokens per crop for every image; None lets the router choose.
        token_cost: The router's price in nats per doubling of visual tokens; 0 is the paper's argmax.
        max_visual_tokens: Limit on the visual tokens, newlines included, of all the prompt's images together.

    Raises:
        BudgetError: A price that is negative or not finite, a limit below 1, or a price for a forced level.
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


def best_levels(values: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]], max_tokens: int) -> list[int]:
    """The levels of a prompt's images with the highest sum of values among those whose tokens stay within a limit.

    A dynamic program over images: for each total of tokens only the best choice so far is kept, and of these only such
    as are worth more than all that take fewer tokens. Among equally good choices the one with fewest tokens is taken.

    Args:
        values: For each image what each level is worth, coarse to fine.
        tokens: For each image its visual tokens at each level.
        max_tokens: The limit on their sum.

    Returns:
        The index of each image's level.

    Raises:
        BudgetError: All images at their coarsest level take more.
    """
    fronts: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for worth, counts in zip(values, tokens, strict=True):
        reached = [
            (total + count, value + more, (*levels, level))
            for total, value, levels in fronts
            for level, (count, more) in enumerate(zip(counts, worth, strict=True))
            if total + count <= max_tokens
        ]
        fronts = []
        for choice in sorted(reached, key=lambda choice: (choice[0], -choice[1])):
            if not fronts or choice[1] > fronts[-1][1]:
                fronts.append(choice)
    if not fronts:
        least = sum(min(counts) for counts in tokens)
        raise BudgetError(
            f"max_visual_tokens {max_tokens} is too low: at the coarsest level the images take {least} visual tokens; "
            "raise the limit, or use fewer or smaller images"
        )
    return list(fronts[-1][2])


__all__ = ["Budget", "BudgetError", "best_levels"]
