"""Reads the weights of a checkpoint in one pass: checksums, NaN and infinite values, and a cast, tensor by tensor.

The pass goes through small buffers. Weights that keep their data type are then mapped from their files: they take no
memory of their own, and processes of one machine share them. Only weights that are cast are copied.
"""

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from avg_llava.checkpoints.checksums import check_checksum, hashing, new_digest, recorded_by_folder
from avg_llava.checkpoints.stored_tensor import NUM_READERS, WEIGHT_DTYPES, StoredTensor, split

logger = logging.getLogger(__name__)


class _Pass(NamedTuple):
    """A tensor that was read: as it is used, its values that are no numbers, its checksum if that was wanted."""

    tensor: Tensor
    num_not_finite: int
    checksum: str | None


def read_weights(tensors: Mapping[str, StoredTensor], source: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights of a checkpoint, by the names in `tensors`.

    The first process of a machine compares checksums, where the checkpoint has some, and warns of values that are NaN
    or infinite.

    Args:
        tensors: The weights in their files.
        source: Name of the checkpoint, for messages.
        dtype: Data type to cast to; None keeps every tensor's own.

    Raises:
        CheckpointError: A tensor differs from its checksum in the manifest or in an archive of PyTorch.
    """
    checks = os.environ.get("LOCAL_RANK", "0") == "0"
    recorded = recorded_by_folder(tensors.values()) if checks else {}

    def read(stored: StoredTensor) -> _Pass:
        return _read(stored, dtype, checks, hashes=bool(stored.name) and stored.file.parent in recorded)

    with ThreadPoolExecutor(NUM_READERS) as pool:
        passes = dict(zip(tensors, pool.map(read, tensors.values()), strict=True))
    for name, stored in tensors.items():
        found = passes[name].checksum
        if found is not None:
            check_checksum(stored, found, recorded)
    bad = {name: each.num_not_finite for name, each in passes.items() if each.num_not_finite}
    if bad:
        first = tensors[next(iter(bad))]
        logger.warning(
            "%s: %d values of %d weights are NaN or infinite, first in %s of %s",
            source,
            sum(bad.values()),
            len(bad),
            first.name,
            first.file,
        )
    return {name: each.tensor for name, each in passes.items()}


def _read(stored: StoredTensor, dtype: torch.dtype | None, counts: bool, hashes: bool) -> _Pass:
    casts = dtype is not None and stored.dtype in WEIGHT_DTYPES and stored.dtype != dtype
    tensor = torch.empty(stored.shape, dtype=dtype) if casts else stored.read()
    digest = new_digest(stored) if hashes else None
    position = num_not_finite = 0
    if casts or counts or hashes:
        chunks = split(tensor) if stored.start is None and not casts else stored.chunks()
        for chunk in chunks if digest is None else hashing(chunks, digest):
            if counts and chunk.is_floating_point() and not all(bound.isfinite() for bound in chunk.aminmax()):
                num_not_finite += int(chunk.isfinite().logical_not().sum())
            if casts:
                tensor.view(-1)[position : position + len(chunk)] = chunk
                position += len(chunk)
    return _Pass(tensor, num_not_finite, digest and digest.hexdigest())
