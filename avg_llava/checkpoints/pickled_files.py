"""Pickled files of tensors (`.bin`, `.pt`), read by PyTorch's restricted unpickler, which runs no code.

A file is a zip archive: the pickle `data.pkl`, which describes the tensors, and a record of bytes for each storage.
PyTorch does not compare the two; here a file is refused unless they agree. Files of PyTorch before 1.6 are sequences of
pickles; they cannot be mapped, and are read into memory.
"""

import io
import pickletools
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from avg_llava.checkpoints.stored_tensor import CheckpointError, StoredTensor

_ALLOWED_GLOBALS = re.compile(
    r"collections OrderedDict|torch Size|torch\.nn\.parameter Parameter|torch\.storage UntypedStorage|"
    r"torch(\.cuda)? \w+Storage|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
)
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, keys of its storages


class Record(NamedTuple):
    """Position and size of a storage's bytes in an archive, and their CRC-32; 0 if PyTorch was told to write none."""

    start: int
    num_bytes: int
    crc: int


def pickled_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a pickled file, by name.

    Raises:
        CheckpointError: The file needs code, is damaged, or holds other things than tensors.
    """
    try:
        with file.open("rb") as stream:
            is_archive = stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
            stream.seek(0)
            records = _check_archive(stream) if is_archive else _check_legacy(stream)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
    except CheckpointError as error:
        raise CheckpointError(f"{file} {error}") from error
    except Exception as error:  # a damaged pickle can end in any exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file} is not a readable pickled file ({reason}); it may be damaged") from error
    named = content
    if isinstance(named, Mapping) and isinstance(named.get("state_dict"), Mapping):
        named = named["state_dict"]  # as training programs save it
    if not isinstance(named, Mapping):
        raise CheckpointError(f"{file} holds a {type(named).__name__}, not tensors by name")
    tensors = {}
    for name, tensor in named.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{file}: entry {name!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(f"{file}: tensor {name} is not a plain one ({tensor.layout} on {tensor.device})")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{file}: tensor {name} of shape {tuple(tensor.shape)} repeats its bytes")
        tensors[name] = tensor.detach()
    known = _match_records(file, content, records) if is_archive else {}
    return {name: _stored(file, name, tensor, known) for name, tensor in tensors.items()}


def _stored(file: Path, name: str, tensor: Tensor, records: Mapping[int, Record]) -> StoredTensor:
    """Describes a tensor of a file; `records` are those of its storages, by their address."""
    start = crc = None
    record = records.get(tensor.untyped_storage().data_ptr())
    if record is not None and tensor.is_contiguous():
        start = record.start + int(tensor.storage_offset()) * tensor.itemsize
        crc = record.crc if tensor.nbytes == record.num_bytes else None
    return StoredTensor(file, tensor.dtype, tuple(tensor.shape), start, lambda: tensor, name, crc or None)


def _check_archive(stream: BinaryIO) -> list[Record]:
    """The records of all storages, in their order in the file.

    Raises:
        CheckpointError: The pickle needs code or is damaged, or a record is compressed or cut short.
    """
    size = stream.seek(0, io.SEEK_END)
    records = []
    for entry in sorted(zipfile.ZipFile(stream).infolist(), key=lambda entry: entry.header_offset):
        stream.seek(entry.header_offset)
        name_length, extra_length = struct.unpack("<26xHH", stream.read(30))
        record = Record(entry.header_offset + 30 + name_length + extra_length, entry.file_size, entry.CRC)
        if entry.compress_type != zipfile.ZIP_STORED or record.start + record.num_bytes > size:
            raise CheckpointError(f"is damaged: record {entry.filename} is compressed or longer than the file")
        name = entry.filename.partition("/")[2].lower()  # PyTorch finds records in any case
        if name.startswith("data/") and record.num_bytes:
            records.append(record)
        elif name in ("data.pkl", "byteorder"):
            stream.seek(record.start)
            content = stream.read(record.num_bytes)
            if entry.CRC not in (0, zlib.crc32(content)):  # PyTorch writes 0 if it is told not to compute it
                raise CheckpointError(f"is damaged: record {entry.filename} has another checksum")
            if name == "data.pkl":
                _check_globals(io.BytesIO(content))
            elif content.decode() != sys.byteorder:
                raise CheckpointError(f"was written by a {content.decode()}-endian machine; save it again on this one")
    return records


def _check_legacy(stream: BinaryIO) -> list[Record]:
    for _ in range(_LEGACY_PICKLES):
        _check_globals(stream)
    return []


def _check_globals(stream: IO[bytes]) -> None:
    """Refuses a pickle that asks for other globals than a dictionary of tensors needs."""
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name in ("GLOBAL", "INST") and not _ALLOWED_GLOBALS.fullmatch(str(argument)):
            name = str(argument).replace(" ", ".")
            raise CheckpointError(
                f"asks for the global {name}, and loading weights runs no code: where you trust the file, save it as "
                "safetensors"
            )
        if operation.name == "STACK_GLOBAL":
            raise CheckpointError("asks for a global by a computed name, and loading weights runs no code")


def _match_records(file: Path, content: Any, records: Sequence[Record]) -> dict[int, Record]:
    """The record of every storage that the tensors in `content` use, by its address in memory.

    The file is mapped in one piece, so storages lie in memory as their records do in the file.

    Raises:
        CheckpointError: Storages and records differ in number, size or order.
    """
    storages = {storage.data_ptr(): storage.nbytes() for storage in _storages(content) if storage.nbytes()}
    addresses = sorted(storages)
    if len(addresses) != len(records):
        raise CheckpointError(f"{file} is damaged: it describes {len(addresses)} storages and holds {len(records)}")
    for address, record in zip(addresses, records, strict=True):
        moved = (address - addresses[0]) - (record.start - records[0].start)
        if storages[address] != record.num_bytes or moved:
            raise CheckpointError(
                f"{file} is damaged: a storage of {storages[address]} bytes is described where it holds "
                f"{record.num_bytes}"
            )
    return dict(zip(addresses, records, strict=True))


def _storages(content: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(content, Tensor):
        yield content.untyped_storage()
    elif isinstance(content, (Mapping, list, tuple)):
        for entry in content.values() if isinstance(content, Mapping) else content:
            yield from _storages(entry)
