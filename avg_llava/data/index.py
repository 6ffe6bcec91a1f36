"""Where the records of a file lie, so that a start-up need not parse them.

The first process that needs a file's index parses and checks every record once and keeps, in a folder beside the file,
one row of 24 bytes for each: its position, the place of its text, and its length. All later ones map these rows into
memory and parse a record when its sample is asked for. The index of a Parquet file holds a copy of its records as well,
as JSON lines, because a row of Parquet cannot be read alone.
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
from avg_llava.data.record_files import parse_text, read_text, scan
from avg_llava.data.records import DataError, RawRecord, Sample, dialogue, parse_record
from avg_llava.data.templates import TEMPLATES

logger = logging.getLogger(__name__)

FORMAT = 1  # to be raised when other records are valid, or when their lengths are counted otherwise
FOLDER = ".avg-llava-index"
ROW = np.dtype([("position", "<i8"), ("begin", "<i8"), ("size", "<i4"), ("length", "<i4")])
"""`length` is the words of all turns, negative for a record without image, 0 for one that is no sample."""
_ROWS, _FACTS, _COPY = "rows.npy", "facts.json", "records.jsonl"
_SETTLED = 2.0  # seconds after which a file that is changed again has another time of change


class Stamp(NamedTuple):
    """What tells a file from what it was before."""

    size: int
    mtime_ns: int


@dataclass(frozen=True)
class RecordIndex:
    """The index of one file under one template.

    Attributes:
        path: The file.
        template: The key of `TEMPLATES` that records were checked with.
        sha256: Of the file's bytes.
        stamp: Of the file that holds the records' text, when it was indexed.
        rows: (records,) of type `ROW`.
        home: Folder that the index is kept in; None where it is only in memory.
        copy: The records' text, where it is neither the file itself nor kept.
    """

    path: Path
    template: str
    sha256: str
    stamp: Stamp
    rows: np.ndarray
    home: Path | None = None
    copy: bytes | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that gets a kept index opens it again, rather than taking a copy of its rows along."""
        if self.home is not None:
            return _load, (self.path, self.template, self.home)
        return RecordIndex, (self.path, self.template, self.sha256, self.stamp, self.rows, self.home, self.copy)

    def record(self, row: int) -> RawRecord:
        """Reads a record.

        Raises:
            DataError: The file was changed since it was indexed.
        """
        begin, size = int(self.rows["begin"][row]), int(self.rows["size"][row])
        return parse_text(self.path, int(self.rows["position"][row]), self._text(begin, size))

    def sample(self, row: int, image_root: Path) -> Sample:
        """Reads a record that is a sample.

        Raises:
            DataError: It is none; or the file was changed since it was indexed.
        """
        return _sample(self.record(row), image_root, self.template)

    def _text(self, begin: int, size: int) -> bytes:
        if self.copy is not None:
            return self.copy[begin : begin + size]
        path = self.path if self.home is None or self.path.suffix != ".parquet" else self.home / _COPY
        try:
            with path.open("rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise DataError(f"{path} was changed while it was in use; start again")
                file.seek(begin)
                return file.read(size)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error


def open_index(path: str | Path, template: str, folder: str | Path | None = None) -> RecordIndex:
    """The index of a file: as it was kept, or built now and kept for others.

    Of processes that need the same index at the same time, one builds it and the others wait. Where the index cannot be
    kept, the process goes on with one of its own in memory.

    Args:
        path: The file.
        template: A key of `TEMPLATES`; records that it cannot hold are no samples.
        folder: Where indices are kept; None means `FOLDER` beside the file.

    Raises:
        DataError: The file cannot be read, or is no file of records.
    """
    path = Path(path)
    try:
        stamp = _stamp(path.stat())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check data.sources") from error
    key = hash_json([FORMAT, str(path.resolve()), stamp, template])
    folder = path.parent / FOLDER if folder is None else Path(folder)
    home = folder / f"{path.name}-{key[:16]}"
    if (index := _kept(path, template, home)) is not None:
        return index
    with _locked(folder, path):
        if (index := _kept(path, template, home)) is not None:
            return index
        index = _build(path, template, stamp)
        # A file that was written just now could be written again without a trace in its stamp.
        return index if abs(time.time() - stamp.mtime_ns / 1e9) < _SETTLED else _keep(index, home)


def _build(path: Path, template: str, stamp: Stamp) -> RecordIndex:
    text = read_text(path)

    def rows() -> Iterator[tuple[int, int, int, int]]:
        for record, begin, size in scan(text):
            try:
                length = _length(_sample(record, path.parent, template))
            except DataError:
                length = 0  # what is wrong with it is told when it is read again, by whoever uses it
            yield record.position, begin, size, length

    index = RecordIndex(path, template, text.sha256, stamp, np.fromiter(rows(), ROW))
    if _stamp(path.stat()) != stamp:
        raise DataError(f"{path} was changed while it was read; start again when it is complete")
    return replace(index, copy=text.content) if path.suffix == ".parquet" else index


def _sample(record: RawRecord, image_root: Path, template: str) -> Sample:
    if record.error is not None:
        raise DataError(f"{record.source}: {record.error}")
    sample = parse_record(record.value, image_root, record.source)
    try:
        TEMPLATES[template].check(dialogue(sample.turns))
    except DataError as error:
        raise DataError(f"{sample.name}: {error}") from None
    return sample


def _length(sample: Sample) -> int:
    words = max(sum(len(turn.value.split()) for turn in sample.turns), 1)
    return words if sample.images else -words


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns)


def _keep(index: RecordIndex, home: Path) -> RecordIndex:
    """Writes an index, whole or not at all; gives it as others will open it, or as it is where it cannot be kept."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=home.parent, ignore_cleanup_errors=True) as name:
            made = Path(name) / "index"
            made.mkdir()
            np.save(made / _ROWS, index.rows)
            stamp = index.stamp
            if index.copy is not None:
                (made / _COPY).write_bytes(index.copy)
                stamp = _stamp((made / _COPY).stat())
            (made / _FACTS).write_text(json.dumps({"sha256": index.sha256, "stamp": stamp, "num": len(index.rows)}))
            if home.exists():
                shutil.rmtree(home)  # damaged, or it would have been opened
            made.rename(home)
        return _load(index.path, index.template, home)
    except OSError as error:
        logger.warning(
            "the index of %s cannot be kept in %s (%s), so every process reads the whole file; name a folder with room "
            "in data.index_dir",
            index.path,
            home.parent,
            error.strerror,
        )
        return index


def _kept(path: Path, template: str, home: Path) -> RecordIndex | None:
    if not home.is_dir():
        return None
    try:
        return _load(path, template, home)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        logger.warning("the index %s is damaged (%s); it is built again", home, error)
        return None


def _load(path: Path, template: str, home: Path) -> RecordIndex:
    facts = json.loads((home / _FACTS).read_text())
    rows = np.asarray(np.load(home / _ROWS, mmap_mode="r"))
    if rows.dtype != ROW or len(rows) != facts["num"]:
        raise ValueError(f"{len(rows)} rows of type {rows.dtype}")
    return RecordIndex(path, template, facts["sha256"], Stamp(*facts["stamp"]), rows, home)


@contextlib.contextmanager
def _locked(folder: Path, path: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of one that is killed. Where there can be no lock, all go on:
    an index is then built more than once, and the same.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / "lock").open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for another process that builds the index of %s", path)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.debug("no lock in %s: %s", folder, error)
        yield


__all__ = ["FOLDER", "RecordIndex", "open_index"]
