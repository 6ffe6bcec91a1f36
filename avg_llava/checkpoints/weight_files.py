"""Files of a checkpoint folder: its `config.json`, and safetensors files read whole or as ranges of bytes.

A safetensors file is eight bytes with the length of a JSON header, the header (name -> dtype, shape, offsets), and the
data. Listing and fingerprinting read no tensor into memory.
"""

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from avg_llava.common.files import hash_chunks, hash_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAMES = ("model.safetensors", "weights.safetensors")

_CHUNK = 16 * 1024 * 1024  # bytes read at a time


class CheckpointError(ValueError):
    """Files or weights of a checkpoint are missing, unexpected or damaged; the message lists all problems."""


class StoredTensor(NamedTuple):
    """Position of a tensor in a file, with its shape and the format's name of its data type."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def resolve_folder(path: str | Path, relative_to: Path | None = None) -> Path:
    """The local folder of a checkpoint, looked up in `relative_to` first; a hub repository is downloaded."""
    path_below = [] if relative_to is None else [relative_to / path]
    for candidate in (*path_below, Path(path).expanduser()):
        if candidate.is_dir():
            return candidate
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"{path}: no such folder, and not a hub id of the form owner/name")
    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    return Path(snapshot_download(str(path), allow_patterns=patterns))


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json, so it is not a model folder")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return raw


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those in its index, or a single one.

    Raises:
        CheckpointError: There is none, or a file in the index is missing. Pickled files are not read.
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


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, mapped from the files into memory."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} cannot be read ({error}); it may be cut short") from error
    return tensors


def list_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Positions of all tensors in some files.

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
    """SHA-256 of names, types, shapes and bytes of tensors, independent of how they are split into files."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(hash_chunks, (_chunks(tensors[name]) for name in names)))
    parts = [
        [name, tensors[name].dtype, tensors[name].shape, digest] for name, digest in zip(names, digests, strict=True)
    ]
    return hash_json(parts)


def _chunks(tensor: StoredTensor) -> Iterator[bytes]:
    remaining = tensor.num_bytes
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        while remaining:
            chunk = stream.read(min(remaining, _CHUNK))
            if not chunk:
                raise CheckpointError(f"{tensor.file} became shorter while it was read")
            remaining -= len(chunk)
            yield chunk
