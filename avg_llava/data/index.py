"""Indices of record files: the byte range and length of every record, so that a start-up need not parse the files.

The first process that needs the index of a file parses and validates every record once and stores, in a folder beside
the file, one row of 24 bytes per record. Later processes map these rows into memory and parse a record when its sample
is requested. The index of a Parquet file also holds a copy of its records as JSON lines, because Parquet cannot be read
row by row.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avg_llava.common.files import hash_json
from avg_llava.data.encoding import check_conversation
from avg_llava.data.records import (
    DataError,
    RawRecord,
    Sample,
    decode_record,
    dialogue,
    parse_record,
    read_file,
    scan_records,
)

logger = logging.getLogger(__name__)

FORMAT = 1  # increase when other records become valid, or when lengths are counted differently
INDEX_DIR_NAME = ".avg-llava-index"
ROW = np.dtype([("position", "<i8"), ("begin", "<i8"), ("size", "<i4"), ("length", "<i4")])
"""`begin` and `size` are in bytes. `length` counts the words of all turns, at least 1; it is negative for a record
without images and 0 for a malformed record."""
_ROWS, _FACTS, _COPY = "rows.npy", "facts.json", "records.jsonl"
_CLOCK_TICK = 2.0  # seconds; two changes of a file within this time may have the same time stamp


class FileStamp(NamedTuple):
    """Size and modification time of a file, which change when the file changes."""

    size: int
    mtime_ns: int


@dataclass(frozen=True)
class RecordIndex:
    """The index of one file under one template.

    Attributes:
        template: The key of `TEMPLATES` that records were validated with.
        stamp: Of the file that holds the records' text, at the time of indexing.
        rows: Array (records,) of type `ROW`.
        folder: Folder that the index is stored in; None if it is only in memory.
        copy: The records' text if it is neither in the file itself nor in `folder`.
    """

    path: Path
    template: str
    sha256: str
    stamp: FileStamp
    rows: np.ndarray
    folder: Path | None = None
    copy: bytes | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles a stored index as its path, so that worker processes map its rows instead of copying them."""
        if self.folder is not None:
            return _load, (self.path, self.template, self.folder)
        return RecordIndex, (self.path, self.template, self.sha256, self.stamp, self.rows, self.folder, self.copy)

    def record(self, row: int) -> RawRecord:
        """Reads a record.

        Raises:
            DataError: The file has changed since it was indexed.
        """
        begin, size = int(self.rows["begin"][row]), int(self.rows["size"][row])
        return decode_record(self.path, int(self.rows["position"][row]), self._read_text(begin, size))

    def sample(self, row: int, image_root: Path) -> Sample:
        """Reads and validates a record.

        Raises:
            DataError: The record is malformed, or an error of `record`.
        """
        return _validate(self.record(row), image_root, self.template)

    def _read_text(self, begin: int, size: int) -> bytes:
        if self.copy is not None:
            return self.copy[begin : begin + size]
        path = self.path if self.folder is None or self.path.suffix != ".parquet" else self.folder / _COPY
        try:
            with path.open("rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise DataError(f"{path} was changed while it was in use; start again")
                file.seek(begin)
                return file.read(size)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error


def open_index(path: str | Path, template: str, index_dir: str | Path | None = None) -> RecordIndex:
    """Loads the stored index of a file, or builds and stores it.

    Of several processes that need the same index at the same time, one builds it and the others wait. If the index
    cannot be stored, it is kept in this process's memory.

    Args:
        template: A key of `TEMPLATES`; records that it cannot hold are malformed.
        index_dir: Folder of stored indices; None means `INDEX_DIR_NAME` beside the file.

    Raises:
        DataError: The file cannot be read or is not a file of records.
    """
    path = Path(path)
    try:
        stamp = _stamp(path.stat())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check data.sources") from error
    index_dir = path.parent / INDEX_DIR_NAME if index_dir is None else Path(index_dir)
    folder = index_dir / f"{path.name}-{hash_json([FORMAT, str(path.resolve()), stamp, template])[:16]}"
    if (index := _load_if_intact(path, template, folder)) is not None:
        return index
    with _locked(index_dir, path):
        if (index := _load_if_intact(path, template, folder)) is not None:
            return index
        index = _build(path, template, stamp)
        # A file written just now could be written again without a change of its stamp.
        return index if abs(time.time() - stamp.mtime_ns / 1e9) < _CLOCK_TICK else _store(index, folder)


def _build(path: Path, template: str, stamp: FileStamp) -> RecordIndex:
    file = read_file(path)

    def rows() -> Iterator[tuple[int, int, int, int]]:
        for record, begin, size in scan_records(file):
            try:
                sample = _validate(record, path.parent, template)
            except DataError:
                length = 0  # the data set that uses the record validates it again and reports the error
            else:
                num_words = max(sum(len(turn.value.split()) for turn in sample.turns), 1)
                length = num_words if sample.images else -num_words
            yield record.position, begin, size, length

    index = RecordIndex(path, template, file.sha256, stamp, np.fromiter(rows(), ROW))
    if _stamp(path.stat()) != stamp:
        raise DataError(f"{path} was changed while it was read; start again when it is complete")
    return replace(index, copy=file.text) if path.suffix == ".parquet" else index


def _validate(record: RawRecord, image_root: Path, template: str) -> Sample:
    if record.error is not None:
        raise DataError(f"{record.source}: {record.error}")
    sample = parse_record(record.value, image_root, record.source)
    try:
        check_conversation(dialogue(sample.turns), template)
    except DataError as error:
        raise DataError(f"{sample.name}: {error}") from None
    return sample


def _stamp(status: os.stat_result) -> FileStamp:
    return FileStamp(status.st_size, status.st_mtime_ns)


def _store(index: RecordIndex, folder: Path) -> RecordIndex:
    """Stores an index atomically; returns the stored index, or the given one if it cannot be stored."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent, ignore_cleanup_errors=True) as name:
            temporary = Path(name) / "index"
            temporary.mkdir()
            np.save(temporary / _ROWS, index.rows)
            stamp = index.stamp
            if index.copy is not None:
                (temporary / _COPY).write_bytes(index.copy)
                stamp = _stamp((temporary / _COPY).stat())
            facts = {"sha256": index.sha256, "stamp": stamp, "num": len(index.rows)}
            (temporary / _FACTS).write_text(json.dumps(facts))
            if folder.exists():
                shutil.rmtree(folder)  # damaged, or it would have been loaded
            temporary.rename(folder)
        return _load(index.path, index.template, folder)
    except OSError as error:
        logger.warning(
            "the index of %s cannot be kept in %s (%s), so every process reads the whole file; name a folder with room "
            "in data.index_dir",
            index.path,
            folder.parent,
            error.strerror,
        )
        return index


def _load_if_intact(path: Path, template: str, folder: Path) -> RecordIndex | None:
    if not folder.is_dir():
        return None
    try:
        return _load(path, template, folder)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        logger.warning("the index %s is damaged (%s); it is built again", folder, error)
        return None


def _load(path: Path, template: str, folder: Path) -> RecordIndex:
    facts = json.loads((folder / _FACTS).read_text())
    rows = np.asarray(np.load(folder / _ROWS, mmap_mode="r"))
    if rows.dtype != ROW or len(rows) != facts["num"]:
        raise ValueError(f"{len(rows)} rows of type {rows.dtype}")
    return RecordIndex(path, template, facts["sha256"], FileStamp(*facts["stamp"]), rows, folder)


@contextlib.contextmanager
def _locked(index_dir: Path, path: Path) -> Iterator[None]:
    """Lets one process at a time build an index; the system releases the lock of a killed process.

    Without a lock, e.g. in a read-only folder, all processes continue and build the same index.
    """
    with contextlib.ExitStack() as stack:
        try:
            index_dir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((index_dir / "lock").open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for another process that builds the index of %s", path)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.debug("no lock in %s: %s", index_dir, error)
        yield
