"""Tensors in safetensors files, handled as ranges of bytes: listed, fingerprinted and merged without loading them.

The format: eight bytes with the length of a JSON header, the header (name -> dtype, shape, offsets), then the data.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from avg_llava.common.files import atomic_write, hash_chunks, hash_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAMES = ("model.safetensors", "weights.safetensors")

_CHUNK = 16 * 1024 * 1024  # bytes in memory at a time


class CheckpointError(ValueError):
    """A checkpoint does not hold what its configuration asks for; the message lists all that is wrong."""


class StoredTensor(NamedTuple):
    """A tensor in a file: data type as the format calls it, shape, and its range of bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, or a single one.

    Raises:
        CheckpointError: There is none, or one of the index is missing. Pickled files do not count.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [name for name in SINGLE_FILE_NAMES if (folder / name).is_file()][:1]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        wanted = ", ".join(missing) or " or ".join((INDEX_NAME, *SINGLE_FILE_NAMES))
        raise CheckpointError(
            f"{folder}: no {wanted}. Only safetensors files are read; convert pickled .bin files first, on a machine "
            "where you trust them"
        )
    return [folder / name for name in names]


def list_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Where each tensor of some files is.

    Raises:
        CheckpointError: A file is cut short or not in the format.
    """
    tensors = {}
    for file in files:
        with file.open("rb") as stream:
            try:
                (header_length,) = struct.unpack("<Q", stream.read(8))
                entries = json.loads(stream.read(min(header_length, os.fstat(stream.fileno()).st_size)))
                entries.pop("__metadata__", None)
                data_start = 8 + header_length
                for name, entry in entries.items():
                    begin, end = entry["data_offsets"]
                    tensors[name] = StoredTensor(
                        file, entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin
                    )
                complete = data_start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{file} is not a safetensors file ({error})") from error
            if os.fstat(stream.fileno()).st_size != complete:
                raise CheckpointError(f"{file} is cut short: its header promises {complete} bytes")
    return tensors


def fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, whatever files they are spread over."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(hash_chunks, (_chunks(tensors[name]) for name in names)))
    parts = [
        [name, tensors[name].dtype, tensors[name].shape, digest] for name, digest in zip(names, digests, strict=True)
    ]
    return hash_json(parts)


def merge(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Writes tensors of other files into one file, a chunk at a time. The file appears whole or not at all."""
    # Wide types first, as the library itself lays files out: every tensor is then aligned to its type.
    names = sorted(tensors, key=lambda name: (-_bytes_per_element(tensors[name]), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_write(path) as temporary, temporary.open("wb") as target:
        target.write(struct.pack("<Q", len(encoded)))
        target.write(encoded)
        for name in names:
            for chunk in _chunks(tensors[name]):
                target.write(chunk)


def _bytes_per_element(tensor: StoredTensor) -> int:
    elements = 1
    for side in tensor.shape:
        elements *= side
    return tensor.num_bytes // max(elements, 1)


def _chunks(tensor: StoredTensor) -> Iterable[bytes]:
    left = tensor.num_bytes
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        while left:
            chunk = stream.read(min(left, _CHUNK))
            if not chunk:
                raise CheckpointError(f"{tensor.file} became shorter while it was read")
            left -= len(chunk)
            yield chunk


__all__ = ["CheckpointError", "StoredTensor", "fingerprint", "list_tensors", "merge", "weight_files"]
