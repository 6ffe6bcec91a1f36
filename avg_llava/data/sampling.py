"""Which records of a file are used, and how often."""

import random
import re
from pathlib import Path

import numpy as np

from avg_llava.data.records import DataError


def select(count: int, sampling: str, weight: float, path: Path, seed: str) -> np.ndarray:
    """Numbers of the records that are used, in the file's order, once per pass.

    Args:
        count: Records of the file.
        sampling: `all`, `first:N`, `end:N` or `random:N` (N records, or a share such as `10%`).
        weight: Passes over these: 2.3 is two, and a third over 30 % of them drawn at random.
        path: The file, for messages.
        seed: Seed of what is drawn.

    Raises:
        DataError: `sampling` is none of these, or asks for more than there is, or `weight` is not positive.
    """
    if not weight > 0:
        raise DataError(f"weight {weight} of {path}: it is the number of passes over the file, and above 0")
    chosen = _sampled(count, sampling, path, seed)
    passes = int(weight)
    rest = random.Random(f"{seed}/weight").sample(range(len(chosen)), round((weight - passes) * len(chosen)))
    return np.concatenate([np.tile(chosen, passes), chosen[np.sort(np.array(rest, dtype=np.int64))]])


def _sampled(count: int, sampling: str, path: Path, seed: str) -> np.ndarray:
    if sampling == "all":
        return np.arange(count)
    match = re.fullmatch(r"(first|end|random):(\d+(?:\.\d+)?%|\d+)", sampling)
    if match is None:
        raise DataError(
            f"sampling {sampling!r} of {path}: use all, first:N, end:N or random:N (N records, or a share such as "
            "10%); to repeat records, set the source's weight"
        )
    kind, amount = match[1], match[2]
    wanted = round(count * float(amount[:-1]) / 100) if amount.endswith("%") else int(amount)
    if wanted > count:
        raise DataError(f"sampling {sampling!r} of {path}: the file holds only {count} records")
    if kind == "first":
        return np.arange(wanted)
    if kind == "end":
        return np.arange(count - wanted, count)
    return np.array(sorted(random.Random(seed).sample(range(count), wanted)), dtype=np.int64)


__all__ = ["select"]
