"""Order of training samples that keeps batches of one modality and of similar length."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[int]):
    """Groups samples so that one optimizer step sees one modality and its micro-batches are of similar length.

    Behaves as `group_by_modality_length` of the released trainer. Samples with and without images are permuted apart
    and cut into megabatches, each the samples of one optimizer step; a megabatch is sorted by length and dealt out to
    its micro-batches so that their sums of lengths are near each other. Megabatches of both kinds are then shuffled.
    What does not fill a megabatch comes last, both kinds joined.

    The order is a function of (seed, epoch) alone: the same on every rank, and after a restart. Micro-batch i of the
    order goes to rank i % processes, as accelerate deals them.

    Args:
        lengths: One number per sample; negative for a sample without image. Zero is refused.
        batch_size: Samples of one micro-batch.
        world_size: Processes.
        accumulation_steps: Micro-batches per process and optimizer step.
        seed: Seed of the permutations.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, world_size: int, accumulation_steps: int = 1, seed: int = 0
    ) -> None:
        if min(batch_size, world_size, accumulation_steps) < 1:
            raise ValueError("batch_size, world_size and accumulation_steps must be at least 1")
        if 0 in lengths:
            raise ValueError(f"sample {list(lengths).index(0)} has length 0, which says nothing about its modality")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.num_chunks = world_size * accumulation_steps
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        with_image = [index for index, length in enumerate(self.lengths) if length > 0]
        text_only = [index for index, length in enumerate(self.lengths) if length < 0]
        full: list[list[int]] = []
        rest: list[int] = []
        for indices in (with_image, text_only):
            order = [indices[position] for position in torch.randperm(len(indices), generator=generator).tolist()]
            size = self.batch_size * self.num_chunks
            num_full = len(order) // size * size
            full += [self._balanced(order[start : start + size]) for start in range(0, num_full, size)]
            rest += order[num_full:]
        for position in torch.randperm(len(full), generator=generator).tolist():
            yield from full[position]
        yield from sorted(rest)

    def _balanced(self, megabatch: list[int]) -> list[int]:
        """Deals a megabatch to its micro-batches, longest sample first, each to the lightest that has room."""
        chunks: list[list[int]] = [[] for _ in range(self.num_chunks)]
        weights = [0] * self.num_chunks
        for index in sorted(megabatch, key=lambda index: abs(self.lengths[index]), reverse=True):
            open_chunks = [number for number, chunk in enumerate(chunks) if len(chunk) < self.batch_size]
            lightest = min(open_chunks, key=weights.__getitem__)
            chunks[lightest].append(index)
            weights[lightest] += abs(self.lengths[index])
        return [index for chunk in chunks for index in chunk]


__all__ = ["ModalityLengthSampler"]
