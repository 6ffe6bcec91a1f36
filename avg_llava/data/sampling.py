"""Which records of a file are used."""

import random
import re
from pathlib import Path

from avg_llava.data.records import DataError, RawRecord


def sample_records(records: list[RawRecord], sampling: str, path: Path, seed: str) -> list[RawRecord]:
    """The records that `sampling` asks for, in the file's order.

    Args:
        records: All of the file's.
        sampling: `all`, `first:N`, `end:N`, `random:N` (N records, or a share such as `10%`) or `repeat:N`.
        path: The file, for messages.
        seed: Seed of `random:N`.

    Raises:
        DataError: `sampling` is none of these, or asks for more than there is.
    """
    if sampling == "all":
        return records
    match = re.fullmatch(r"(first|end|random|repeat):(\d+(?:\.\d+)?%|\d+)", sampling)
    if match is None or (match[1] == "repeat" and "%" in match[2]):
        raise DataError(
            f"sampling {sampling!r} of {path}: use all, first:N, end:N, random:N (N records, or a share such as 10%) "
            "or repeat:N"
        )
    kind, amount = match[1], match[2]
    if kind == "repeat":
        return records * int(amount)
    count = round(len(records) * float(amount[:-1]) / 100) if amount.endswith("%") else int(amount)
    if count > len(records):
        raise DataError(f"sampling {sampling!r} of {path}: the file holds only {len(records)} records")
    if kind == "first":
        return records[:count]
    if kind == "end":
        return records[len(records) - count :]
    chosen = random.Random(seed).sample(range(len(records)), count)
    return [records[index] for index in sorted(chosen)]


__all__ = ["sample_records"]
