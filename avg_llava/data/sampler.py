"""Batch samplers: the samples of each micro-batch, and the order of micro-batches.

A micro-batch is filled up to a capacity, in samples or in tokens. The order is a function of (seed, epoch) alone, the
same on every rank and after a restart. Micro-batch i goes to rank i % world_size, as accelerate distributes them, and
every epoch has the same number of micro-batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import Sampler

MicroBatch = list[int]
"""Indices of samples."""
Step = list[MicroBatch]
"""Micro-batches of one optimizer step, over all ranks."""


def fill(order: Sequence[int], costs: Sequence[int] | None, capacity: int) -> list[MicroBatch]:
    """Cuts an order of samples into micro-batches, each filled until the next sample would exceed the capacity.

    Args:
        order: Indices of samples.
        costs: Cost of each sample of the data set; None means 1 each.
        capacity: Maximal cost of a micro-batch. A sample that costs more is a micro-batch by itself.
    """
    if costs is None:
        return [list(order[start : start + capacity]) for start in range(0, len(order), capacity)]
    batches: list[MicroBatch] = []
    room = 0
    for index in order:
        if not batches or costs[index] > room:
            batches.append([])
            room = capacity
        batches[-1].append(index)
        room -= costs[index]
    return batches


@dataclass(eq=False, repr=False)
class MicroBatches(Sampler[MicroBatch], ABC):
    """Micro-batches of an epoch.

    With `tokens`, every epoch has the same micro-batches in another order, because every epoch needs the same number of
    optimizer steps. Their number is made a multiple of `world_size` by halving some of the last ones. If the budget
    holds hardly two samples, that may be impossible, and accelerate repeats the first micro-batch.

    Args:
        capacity: Samples of a micro-batch or, with `tokens`, tokens.
        accumulation_steps: Micro-batches per process and optimizer step.
        tokens: Token count of each sample.
    """

    num_samples: int
    capacity: int
    world_size: int = 1
    accumulation_steps: int = 1
    seed: int = 0
    tokens: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if min(self.capacity, self.world_size, self.accumulation_steps) < 1:
            raise ValueError("capacity, world_size and accumulation_steps must be at least 1")
        if self.tokens is not None:
            self.tokens = list(map(int, self.tokens))
        self.num_chunks = self.world_size * self.accumulation_steps
        # accelerate completes the last micro-batch to this size with the first samples.
        self.batch_size = self.capacity if self.tokens is None else None
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the permutation of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.tokens is None:
            return -(-self.num_samples // self.capacity)
        steps, rest = self._fixed_batches
        return sum(map(len, steps)) + len(rest)

    def __iter__(self) -> Iterator[MicroBatch]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        steps, rest = self._make_batches(generator) if self.tokens is None else self._fixed_batches
        for number in torch.randperm(len(steps), generator=generator).tolist():
            yield from steps[number]
        yield from rest

    @abstractmethod
    def _make_batches(self, generator: torch.Generator) -> tuple[list[Step], list[MicroBatch]]:
        """Steps, which are shuffled afterwards, and the remaining micro-batches, which come last."""

    @cached_property
    def _fixed_batches(self) -> tuple[list[Step], list[MicroBatch]]:
        """The micro-batches of every epoch with `tokens`."""
        steps, rest = self._make_batches(torch.Generator().manual_seed(self.seed))
        # Enough samples to halve for any world size, so that a run can continue with another one.
        while steps and sum(len(batch) - 1 for batch in rest) < self.num_chunks - 1:
            rest = steps.pop() + rest
        while len(rest) % self.world_size and any(len(batch) > 1 for batch in rest):
            largest = max(rest, key=len)
            rest.append(largest[len(largest) // 2 :])
            del largest[len(largest) // 2 :]
        return steps, rest

    def _split_into_steps(self, batches: list[MicroBatch]) -> tuple[list[Step], list[MicroBatch]]:
        """Complete optimizer steps, and the micro-batches that are left over."""
        num_full = len(batches) // self.num_chunks * self.num_chunks
        steps = [batches[start : start + self.num_chunks] for start in range(0, num_full, self.num_chunks)]
        return steps, batches[num_full:]


class ShuffledBatches(MicroBatches):
    """Samples in random order."""

    def _make_batches(self, generator: torch.Generator) -> tuple[list[Step], list[MicroBatch]]:
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        batches = fill(order, self.tokens, self.capacity)
        return ([], batches) if self.tokens is None else self._split_into_steps(batches)


class ModalityBatches(MicroBatches):
    """Groups samples so that an optimizer step has one modality and micro-batches of similar length.

    Matches `group_by_modality_length` of the released trainer. Samples with and without images are permuted separately
    and cut into megabatches, the samples of one optimizer step. A megabatch is sorted by length and distributed to its
    micro-batches such that their total lengths are similar. Megabatches of both modalities are then shuffled. Samples
    that do not fill a megabatch come last, both modalities together. The arguments after `lengths` are those of
    `MicroBatches`, from `capacity` on.

    Args:
        lengths: Length of each sample, negative for a sample without images; 0 is refused.
    """

    def __init__(self, lengths: Sequence[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(len(lengths), *args, **kwargs)
        self.lengths = [int(length) for length in lengths]
        self._weights = [abs(length) for length in self.lengths] if self.tokens is None else self.tokens
        if 0 in self.lengths:
            raise ValueError(f"sample {self.lengths.index(0)} has length 0, which says nothing about its modality")

    def _make_batches(self, generator: torch.Generator) -> tuple[list[Step], list[MicroBatch]]:
        with_image = [index for index, length in enumerate(self.lengths) if length > 0]
        text_only = [index for index, length in enumerate(self.lengths) if length < 0]
        steps: list[Step] = []
        rest: list[int] = []
        for indices in (with_image, text_only):
            order = torch.randperm(len(indices), generator=generator).tolist()
            batches = fill([indices[number] for number in order], self.tokens, self.capacity)
            if batches and self.tokens is None and len(batches[-1]) < self.capacity:
                rest += batches.pop()
            full, left_over = self._split_into_steps(batches)
            steps += map(self._balance, full)
            rest += [index for batch in left_over for index in batch]
        return steps, fill(sorted(rest), self.tokens, self.capacity)

    def _balance(self, step: Step) -> Step:
        """Redistributes the samples of a step, longest first, each to the lightest micro-batch that has room.

        With `tokens`, a sample may find no room; the step is then returned unchanged.
        """
        chunks: list[MicroBatch] = [[] for _ in step]
        totals = [0] * len(step)
        for index in sorted((index for batch in step for index in batch), key=self._weights.__getitem__, reverse=True):
            fitting = [number for number, chunk in enumerate(chunks) if self._has_room(chunk, totals[number], index)]
            if not fitting:
                return step
            lightest = min(fitting, key=totals.__getitem__)
            chunks[lightest].append(index)
            totals[lightest] += self._weights[index]
        return chunks

    def _has_room(self, chunk: MicroBatch, total: int, index: int) -> bool:
        if self.tokens is None:
            return len(chunk) < self.capacity
        return not chunk or total + self.tokens[index] <= self.capacity
