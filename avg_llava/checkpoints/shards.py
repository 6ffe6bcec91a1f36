"""Writes safetensors shards of tensors that are computed one at a time, with their index.

The files are those of `safetensors.torch.save_file`, which needs all tensors of a file in memory; here a file's tensors
pass through a buffer.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from avg_llava.checkpoints.weight_files import DTYPE_NAMES, INDEX_NAME, CheckpointError
from avg_llava.common.files import atomic_write, encode_json, write_json

SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: its name, data type and shape, and a function that gives its elements part by part."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def split_shards(tensors: Sequence[PlannedTensor], max_bytes: int) -> dict[str, list[PlannedTensor]]:
    """Files by name, of at most `max_bytes` of weights each unless one tensor is larger; tensors keep their order."""
    shards: list[list[PlannedTensor]] = []
    free = 0
    for tensor in tensors:
        if not shards or tensor.num_bytes > free:
            shards.append([])
            free = max_bytes
        shards[-1].append(tensor)
        free -= tensor.num_bytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shards(folder: Path, shards: dict[str, list[PlannedTensor]]) -> None:
    """Writes the files, each atomically, and then the index if there are several.

    Raises:
        CheckpointError: Values are too large for the data type of their tensor.
    """
    for name, tensors in shards.items():
        with atomic_write(folder / name) as temporary:
            _write_file(temporary, tensors)
    if list(shards) != [SINGLE_NAME]:
        total = sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors)
        weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}, sort_keys=True)


def _write_file(path: Path, tensors: Sequence[PlannedTensor]) -> None:
    # Wide types come first, so that every tensor is aligned in a mapped file.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        end = position + tensor.num_bytes
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = encode_json(header, separators=(",", ":"))
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in ordered:
            written = overflown = 0
            for part in tensor.parts():
                cast = part.to(tensor.dtype)
                if cast.dtype != part.dtype:
                    overflown += int(part.isfinite().sum() - cast.isfinite().sum())
                written += stream.write(cast.contiguous().view(torch.uint8).numpy().data)
            if overflown:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise CheckpointError(f"{tensor.name}: {overflown} values are too large for {dtype}; keep a wider type")
            assert written == tensor.num_bytes, f"{tensor.name}: {written} bytes written, {tensor.num_bytes} planned"
