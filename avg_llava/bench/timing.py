"""Repeats that alternate between variants, so that load from other processes affects all alike; machine facts."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from avg_llava.common.machine import machine_facts

Name = TypeVar("Name", bound=str)
Result = TypeVar("Result")


def alternate(
    variants: Mapping[Name, Callable[[], Result]], repeats: int, description: str
) -> dict[Name, list[Result]]:
    """Calls each variant once per round, for one warm-up round and `repeats` further rounds.

    Returns:
        The results of each variant in order; the first is that of the warm-up.
    """
    results: dict[Name, list[Result]] = {name: [] for name in variants}
    total = len(variants) * (repeats + 1)
    with tqdm(total=total, desc=description, unit="run", disable=None) as progress:
        for _ in range(repeats + 1):
            for name, run in variants.items():
                results[name].append(run())
                progress.update()
    return results


def environment() -> dict[str, Any]:
    """The entries `machine` (hardware, library versions, torch threads) and `measured_at` (date) of a result."""
    return {
        "machine": machine_facts() | {"threads": torch.get_num_threads()},
        "measured_at": time.strftime("%Y-%m-%d"),
    }
