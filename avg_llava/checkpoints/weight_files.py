"""Files of a checkpoint folder: `config.json` and weights, safetensors or pickled, single or sharded by an index.

Files are checked and listed without taking memory for their tensors, and code in them is never run.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from avg_llava.checkpoints.hub import download
from avg_llava.checkpoints.pickled_files import pickled_tensors
from avg_llava.checkpoints.stored_tensor import CheckpointError as CheckpointError
from avg_llava.checkpoints.stored_tensor import StoredTensor as StoredTensor
from avg_llava.common.files import hash_chunks, hash_json

INDEX_NAME = "model.safetensors.index.json"
# Of several ways in which a folder holds weights, the first is read, as by transformers.
WEIGHT_NAMES = (
    "model.safetensors",
    INDEX_NAME,
    "weights.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_DTYPES = {  # by safetensors' names
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_COUNTS, _MAX_COUNT = ("num_hidden_layers", "num_labels"), 10_000
_QUANTIZED = ("quantization_config", "compression_config")
_LFS_POINTER = b"version https://git-lfs"


def resolve_folder(path: str | Path, relative_to: Path | None = None) -> Path:
    """The local folder of a checkpoint, looked up in `relative_to` first; a hub repository is downloaded.

    Args:
        path: A folder, or `owner/name` or `owner/name@revision` on the hub.
        relative_to: Folder to look in first.

    Raises:
        ValueError: There is no such folder or repository.
    """
    path_below = [] if relative_to is None else [relative_to / path]
    for candidate in (*path_below, Path(os.path.expanduser(path))):
        if candidate.is_dir():
            return candidate
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(path))
    if match is None:
        raise ValueError(f"{path}: no such folder, and not a hub id of the form owner/name or owner/name@revision")
    return download(match[1], match[2], WEIGHT_NAMES, read_index)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a folder.

    Raises:
        CheckpointError: There is none, or it is damaged, or it asks for more layers than any model has, or its weights
            are quantised.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no config.json, so it is not a model folder")
    raw = read_json(file)
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for key in _COUNTS:  # libraries build lists of these lengths
            if isinstance(part.get(key), (int, float)) and part[key] > _MAX_COUNT:
                raise CheckpointError(f"{file}: {key} is {part[key]}, more than {_MAX_COUNT}")
        for key in _QUANTIZED:
            if part.get(key) is not None:
                raise CheckpointError(
                    f"{file}: {key} is set, and quantised weights are not supported; take the checkpoint that is not "
                    "quantised, and quantise it while loading"
                )
    return raw


def read_json(file: Path) -> dict[str, Any]:
    """The parsed content of a file that holds a JSON object."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return raw


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: those in its index, or a single one; safetensors if there are both.

    A path of a file is that file.

    Raises:
        CheckpointError: There is none, or the index is damaged or names files that are missing or not in the folder.
    """
    if folder.is_file():
        return [folder]
    found = next((name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder} holds no weights, neither {', '.join(WEIGHT_NAMES[:-1])} nor {WEIGHT_NAMES[-1]}"
        )
    if not found.endswith(".json"):
        return [folder / found]
    names = sorted(set(read_index(folder / found).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} of {found} missing; the download may be incomplete")
    return [folder / name for name in names]


def read_index(file: Path) -> dict[str, str]:
    """The file of every tensor, from an index of shards.

    Raises:
        CheckpointError: The index is damaged, or names other things than files beside it.
    """
    names = read_json(file).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{file} has no weight_map from tensors to files")
    for tensor, name in names.items():
        # What is no plain name of a file could lead out of the folder.
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.(safetensors|bin|pt)", name):
            raise CheckpointError(
                f"{file}: tensor {tensor} is said to be in {name!r}, which is no file name of weights"
            )
    return names


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder or of a single file, by name, not read yet.

    Raises:
        CheckpointError: Files are missing or damaged, or do not hold what their index promises.
    """
    files = weight_files(folder)
    tensors = list_tensors(files)
    index = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), folder)
    if index.suffix == ".json":
        for name, file in read_index(index).items():
            if name not in tensors or tensors[name].file.name != file:
                raise CheckpointError(f"{folder / file} lacks the tensor {name}, which {index.name} promises")
    return tensors


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, mapped from the files into memory."""
    return {name: tensor.read() for name, tensor in stored_tensors(folder).items()}


def read_file(file: Path) -> dict[str, Tensor]:
    """All tensors of one file, mapped into memory."""
    return {name: tensor.read() for name, tensor in list_tensors([file]).items()}


def list_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of some files, by name.

    Raises:
        CheckpointError: A file is damaged, in another format or asks for code, or two files hold the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        with file.open("rb") as stream:
            head = stream.read(len(_LFS_POINTER))
        if not head:
            raise CheckpointError(f"{file} is empty; the download may be incomplete")
        if head == _LFS_POINTER:
            raise CheckpointError(f"{file} is a pointer of git-lfs, not weights: run `git lfs pull` in its repository")
        found = _safetensors(file) if file.suffix == ".safetensors" else pickled_tensors(file)
        for name in found.keys() & tensors.keys():
            raise CheckpointError(f"{file} and {tensors[name].file.name} both hold the tensor {name}")
        tensors |= found
    return tensors


def _safetensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file; the library checks types, shapes and positions and the size of the file."""
    try:
        opened = safe_open(file, framework="pt")
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
    except (SafetensorError, ValueError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({reason}); it may be damaged or cut short"
        ) from error
    tensors = {}
    for name in opened.keys():  # noqa: SIM118 - it is no mapping
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{file}: tensor {name} is of type {entry['dtype']}, which is not supported")
        tensors[name] = StoredTensor(
            file,
            _DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            partial(opened.get_tensor, name),
            name,
        )
    return tensors


def fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, independent of how they are split into files."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_hash, (tensors[name] for name in names)))
    parts = [
        [name, DTYPE_NAMES.get(tensors[name].dtype, str(tensors[name].dtype)), tensors[name].shape, digest]
        for name, digest in zip(names, digests, strict=True)
    ]
    return hash_json(parts)


def _hash(tensor: StoredTensor) -> str:
    """SHA-256 of the tensor's bytes."""
    return hash_chunks(chunk.view(torch.uint8).numpy().data for chunk in tensor.chunks())
