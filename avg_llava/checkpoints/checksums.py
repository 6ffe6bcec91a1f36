"""Checksums of weights, which training writes into a checkpoint's manifest and loading compares.

A checksum is the SHA-256 of a tensor's type, shape and bytes: it names the tensor that has changed, and several are
computed at a time.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avg_llava.checkpoints.stored_tensor import NUM_READERS, CheckpointError, StoredTensor
from avg_llava.checkpoints.weight_files import WEIGHT_NAMES, list_tensors, read_json, weight_files

MANIFEST_NAME = "stage.json"
CHECKSUMS_KEY = "weights"

REMEDY = (
    "the weights are not those that training wrote: copy them again, or, if they were changed on purpose, remove "
    f"{CHECKSUMS_KEY!r} from {MANIFEST_NAME}"
)

Checksums = dict[str, dict[str, str]]
"""Of every tensor, by the name of its file and its own name in it."""


def new_digest(tensor: StoredTensor) -> Any:
    """A hash object that the tensor's bytes are to be added to."""
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())


def hashing(chunks: Iterable[Tensor], digest: Any) -> Iterator[Tensor]:
    """Passes chunks of a tensor on and adds their bytes to a hash object."""
    for chunk in chunks:
        digest.update(chunk.view(torch.uint8).numpy())
        yield chunk


def compute_checksums(folder: Path) -> Checksums | None:
    """Checksums of all weights in a folder; None if it holds none, as a checkpoint of shards of ZeRO-3 may."""
    if not any((folder / name).is_file() for name in WEIGHT_NAMES):
        return None
    checksums: Checksums = {}
    tensors = list_tensors(weight_files(folder)).values()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for tensor, checksum in zip(tensors, pool.map(_checksum, tensors), strict=True):
            checksums.setdefault(tensor.file.name, {})[tensor.name] = checksum
    return checksums


def _checksum(tensor: StoredTensor) -> str:
    digest = new_digest(tensor)
    for _ in hashing(tensor.chunks(), digest):
        pass
    return str(digest.hexdigest())


def recorded_checksums(folder: Path) -> Checksums | None:
    """The checksums in the manifest of a folder; None if it has none.

    Raises:
        CheckpointError: The manifest is damaged.
    """
    file = folder / MANIFEST_NAME
    recorded = read_json(file).get(CHECKSUMS_KEY) if file.is_file() else None
    if recorded is None:
        return None
    if not isinstance(recorded, dict) or not all(isinstance(names, dict) for names in recorded.values()):
        raise CheckpointError(f"{file}: {CHECKSUMS_KEY} must be a mapping of files to checksums of their tensors")
    return recorded


def recorded_by_folder(tensors: Iterable[StoredTensor]) -> dict[Path, Checksums]:
    """The checksums in the manifests beside the files of some tensors."""
    recorded = {folder: recorded_checksums(folder) for folder in {tensor.file.parent for tensor in tensors}}
    return {folder: checksums for folder, checksums in recorded.items() if checksums is not None}


def check_checksum(tensor: StoredTensor, found: str, recorded: Mapping[Path, Checksums]) -> None:
    """Raises CheckpointError if the checksum of a tensor is not the recorded one of its folder."""
    if found != recorded[tensor.file.parent].get(tensor.file.name, {}).get(tensor.name):
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name} differs from its checksum; {REMEDY}")


def checked_chunks(tensor: StoredTensor, recorded: Mapping[Path, Checksums]) -> Iterator[Tensor]:
    """The tensor's chunks; what it is computed from is read and compared first.

    Raises:
        CheckpointError: The bytes differ from a recorded checksum or a CRC, which is known after the last chunk.
    """
    for part in tensor.parts:
        for _ in checked_chunks(part, recorded):
            pass
    if not tensor.name or tensor.file.parent not in recorded:
        yield from tensor.chunks()
        return
    digest = new_digest(tensor)
    yield from hashing(tensor.chunks(), digest)
    check_checksum(tensor, digest.hexdigest(), recorded)
