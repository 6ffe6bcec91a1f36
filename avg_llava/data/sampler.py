"""Which samples make a micro-batch, and in which order micro-batches come.

A micro-batch is filled up to a capacity: a number of samples, or of tokens. Either way the order is a function of
(seed, epoch) alone, the same on every rank and after a restart. Micro-batch i of the order goes to rank i % processes,
as accelerate deals them, and an epoch has the same number of them whatever its permutation.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch.utils.data import Sampler


def fill(order: Sequence[int], costs: Sequence[int] | None, capacity: int) -> list[list[int]]:
    """Cuts an order into micro-batches: each takes samples until the next would be too much.

    Args:
        order: Positions of samples.
        costs: What each sample of the data set costs; None: one each.
        capacity: What a micro-batch may cost. A sample that costs more is alone.
    """
    if costs is None:
        return [list(order[start : start + capacity]) for start in range(0, len(order), capacity)]
    batches: list[list[int]] = []
    room = 0
    for index in order:
        if not batches or costs[index] > room:
            batches.append([])
            room = capacity
        batches[-1].append(index)
        room -= costs[index]
    return batches


class MicroBatches(Sampler[list[int]], ABC):
    """Micro-batches of an epoch.

    With `tokens`, the same micro-batches come in every epoch, in another order: an epoch must have as many optimizer
    steps as any other. Their number is made a multiple of the processes by halving some of the last; only where hardly
    two samples fit into the budget together may that be impossible, and accelerate repeats the first.

    Args:
        num_samples: Samples of the data set.
        capacity: Samples of a micro-batch or, with `tokens`, tokens.
        world_size: Processes.
        accumulation_steps: Micro-batches per process and optimizer step.
        seed: Seed of the permutations.
        tokens: Tokens of each sample.

    Attributes:
        batch_size: Samples of a micro-batch, where all have as many: accelerate then completes the last with the first
            samples.
    """

    def __init__(
        self,
        num_samples: int,
        capacity: int,
        world_size: int = 1,
        accumulation_steps: int = 1,
        seed: int = 0,
        tokens: Sequence[int] | None = None,
    ) -> None:
        if min(capacity, world_size, accumulation_steps) < 1:
            raise ValueError("capacity, world_size and accumulation_steps must be at least 1")
        self.num_samples = num_samples
        self.capacity = capacity
        self.world_size = world_size
        self.num_chunks = world_size * accumulation_steps
        self.seed = seed
        self.tokens = None if tokens is None else [int(count) for count in tokens]
        self.batch_size = capacity if tokens is None else None
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.tokens is None:
            return -(-self.num_samples // self.capacity)
        steps, rest = self._contents
        return sum(map(len, steps)) + len(rest)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.tokens is None:
            steps, rest = self._drawn(generator)
        else:
            steps, rest = self._contents
        for position in torch.randperm(len(steps), generator=generator).tolist():
            yield from steps[position]
        yield from rest

    @abstractmethod
    def _drawn(self, generator: torch.Generator) -> tuple[list[list[list[int]]], list[list[int]]]:
        """Groups of micro-batches, to be shuffled, and those that come last."""

    @cached_property
    def _contents(self) -> tuple[list[list[list[int]]], list[list[int]]]:
        steps, rest = self._drawn(torch.Generator().manual_seed(self.seed))
        # By what any number of processes may need, so that a run can go on with another number of them.
        while steps and sum(len(batch) - 1 for batch in rest) < self.num_chunks - 1:
            rest = steps.pop() + rest
        while len(rest) % self.world_size and any(len(batch) > 1 for batch in rest):
            largest = max(rest, key=len)
            rest.append(largest[len(largest) // 2 :])
            del largest[len(largest) // 2 :]
        return steps, rest

    def _filled(self, order: Sequence[int]) -> list[list[int]]:
        return fill(order, self.tokens, self.capacity)

    def _cut_into_steps(self, batches: list[list[int]]) -> tuple[list[list[list[int]]], list[list[int]]]:
        """The micro-batches of each optimizer step, and those that fill none."""
        num_full = len(batches) // self.num_chunks * self.num_chunks
        return [batches[at : at + self.num_chunks] for at in range(0, num_full, self.num_chunks)], batches[num_full:]


class ShuffledBatches(MicroBatches):
    """Samples in a random order."""

    def _drawn(self, generator: torch.Generator) -> tuple[list[list[list[int]]], list[list[int]]]:
        batches = self._filled(torch.randperm(self.num_samples, generator=generator).tolist())
        if self.tokens is None:
            return [], batches
        return self._cut_into_steps(batches)


class ModalityBatches(MicroBatches):
    """Groups samples so that one optimizer step sees one modality and its micro-batches are of similar length.

    Behaves as `group_by_modality_length` of the released trainer. Samples with and without images are permuted apart
    and cut into megabatches, each the samples of one optimizer step; a megabatch is sorted by length and dealt out to
    its micro-batches so that their sums of lengths are near each other. Megabatches of both kinds are then shuffled.
    What does not fill a megabatch comes last, both kinds joined.

    Args:
        lengths: One number per sample; negative for a sample without image. Zero is refused.
        capacity: As in `MicroBatches`, like the arguments after it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        capacity: int,
        world_size: int = 1,
        accumulation_steps: int = 1,
        seed: int = 0,
        tokens: Sequence[int] | None = None,
    ) -> None:
        super().__init__(len(lengths), capacity, world_size, accumulation_steps, seed, tokens)
        self.lengths = [int(length) for length in lengths]
        self._weights = [abs(length) for length in self.lengths] if self.tokens is None else self.tokens
        if 0 in self.lengths:
            raise ValueError(f"sample {self.lengths.index(0)} has length 0, which says nothing about its modality")

    def _drawn(self, generator: torch.Generator) -> tuple[list[list[list[int]]], list[list[int]]]:
        with_image = [index for index, length in enumerate(self.lengths) if length > 0]
        text_only = [index for index, length in enumerate(self.lengths) if length < 0]
        steps: list[list[list[int]]] = []
        rest: list[int] = []
        for indices in (with_image, text_only):
            order = torch.randperm(len(indices), generator=generator).tolist()
            batches = self._filled([indices[position] for position in order])
            if batches and self.tokens is None and len(batches[-1]) < self.capacity:
                rest += batches.pop()
            full, left = self._cut_into_steps(batches)
            steps += map(self._balanced, full)
            rest += [index for batch in left for index in batch]
        return steps, self._filled(sorted(rest))

    def _balanced(self, batches: list[list[int]]) -> list[list[int]]:
        """Deals the samples of an optimizer step to its micro-batches anew, longest first, each to the lightest that
        has room; where one finds no room, as may happen with tokens, they stay as they were.
        """
        chunks: list[list[int]] = [[] for _ in batches]
        totals = [0] * len(batches)
        for index in sorted(
            (index for batch in batches for index in batch), key=self._weights.__getitem__, reverse=True
        ):
            fitting = [number for number, chunk in enumerate(chunks) if self._has_room(chunk, totals[number], index)]
            if not fitting:
                return batches
            lightest = min(fitting, key=totals.__getitem__)
            chunks[lightest].append(index)
            totals[lightest] += self._weights[index]
        return chunks

    def _has_room(self, chunk: list[int], total: int, index: int) -> bool:
        if self.tokens is None:
            return len(chunk) < self.capacity
        return not chunk or total + self.tokens[index] <= self.capacity


__all__ = ["MicroBatches", "ModalityBatches", "ShuffledBatches", "fill"]
