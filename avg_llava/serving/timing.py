"""How long the first token takes at several budgets, one beside the other."""

import statistics
import time
from collections.abc import Sequence

from avg_llava.inference.answers import Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.predictor import Predictor

ROUNDS, SECONDS = 5, 2.0


def time_first_tokens(predictor: Predictor, request: Request, budgets: Sequence[Budget]) -> list[float]:
    """Median milliseconds until the first token at each budget, measured alternately.

    There are `ROUNDS` rounds, fewer where they would take longer than `SECONDS`: slow models vary less, and somebody
    waits.
    """
    times: list[list[float]] = [[] for _ in budgets]
    began = time.monotonic()
    for _ in range(ROUNDS):
        for own, budget in zip(times, budgets, strict=True):
            own.append(predictor.predict([request], budget, Decoding(1))[0].timings.first_token)
        if time.monotonic() - began > SECONDS:
            break
    return [statistics.median(own) for own in times]


__all__ = ["time_first_tokens"]
