"""Files of records: a JSON list, JSON lines or Parquet, read record by record with the place of each in the text."""

import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from avg_llava.common.files import hash_bytes
from avg_llava.data.records import DataError, RawRecord

_COLUMNS = ("id", "image", "conversations")
_KINDS = {".jsonl": "line", ".parquet": "row"}  # what a record is called; in any other file it is a "record"
_FIRST_LINE = {".jsonl": 1, ".parquet": 0}
_UTF8_MARK = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")


class RecordText(NamedTuple):
    """The text that holds a file's records.

    Attributes:
        path: The file.
        sha256: Of the file's bytes.
        content: The text in UTF-8: the file itself, or, of a Parquet file, one JSON object per line.
    """

    path: Path
    sha256: str
    content: bytes


class PlacedRecord(NamedTuple):
    """A record and where its text begins and how long it is, in bytes."""

    record: RawRecord
    begin: int
    size: int


def read_records(path: str | Path) -> list[RawRecord]:
    """Reads all records of a file: a JSON list or, by the name's ending, JSON lines (`.jsonl`) or Parquet (`.parquet`).

    Raises:
        DataError: The file is missing, is not UTF-8, is not JSON, or is not a list.
    """
    return [placed.record for placed in scan(read_text(path))]


def read_text(path: str | Path) -> RecordText:
    """Reads a file; of Parquet, the columns `id`, `image` and `conversations`, turned into JSON lines.

    Raises:
        DataError: The file is missing, or no Parquet file with these columns.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check data.sources") from error
    sha256 = hash_bytes(content)
    return RecordText(path, sha256, _parquet_lines(path, content) if path.suffix == ".parquet" else content)


def scan(text: RecordText) -> Iterator[PlacedRecord]:
    """The records of a text, one after another. A line that is not JSON is a record with an error.

    Raises:
        DataError: A list is not UTF-8, is not JSON, or is none.
    """
    return _lines(text) if text.path.suffix in _FIRST_LINE else _elements(text)


def parse_text(path: Path, position: int, text: bytes) -> RawRecord:
    """A record from its text."""
    try:
        return RawRecord(json.loads(text.decode()), _name(path, position), position)
    except (ValueError, RecursionError) as error:
        return RawRecord(None, _name(path, position), position, f"not JSON: {error}")


def _name(path: Path, position: int) -> str:
    return f"{path}, {_KINDS.get(path.suffix, 'record')} {position}"


def _lines(text: RecordText) -> Iterator[PlacedRecord]:
    """JSON lines; blank ones are counted and passed over."""
    content, number = text.content, _FIRST_LINE[text.path.suffix]
    begin = len(_UTF8_MARK) if content.startswith(_UTF8_MARK) else 0
    while begin < len(content):
        end = content.find(b"\n", begin)
        end = len(content) if end < 0 else end
        line = content[begin:end]
        if line.strip():
            yield PlacedRecord(parse_text(text.path, number, line), begin, len(line))
        begin, number = end + 1, number + 1


def _elements(file: RecordText) -> Iterator[PlacedRecord]:
    """Elements of a JSON list.

    They are found in the bytes taken as Latin-1, where a byte is a character, so that places in the text are places in
    the file; what is not ASCII is read again as what it is.
    """
    path, content = file.path, file.content
    text = str(content, "latin-1")
    decode = json.JSONDecoder().raw_decode

    def skip(at: int) -> int:
        match = _SPACE.match(text, at)
        assert match is not None, "it matches the empty text"
        return match.end()

    try:
        at = skip(len(_UTF8_MARK) if content.startswith(_UTF8_MARK) else 0)
        if text[at : at + 1] != "[":
            value = json.loads(text[at:])
            raise DataError(f"{path} holds a {type(value).__name__}, but a list of records is expected")
        at, index = skip(at + 1), 0
        is_open = text[at : at + 1] != "]"
        while is_open:
            value, end = decode(text, at)
            raw = content[at:end]
            record = RawRecord(value if raw.isascii() else json.loads(raw.decode()), _name(path, index), index)
            yield PlacedRecord(record, at, end - at)
            index += 1
            at = skip(end)
            is_open = text[at : at + 1] == ","
            if is_open:
                at = skip(at + 1)
        if text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        if skip(at + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, skip(at + 1))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(_explain(path, content, error)) from error


def _explain(path: Path, content: bytes, error: Exception) -> str:
    """Why a file is no JSON list: it may be in another encoding."""
    try:
        content.decode()
    except UnicodeDecodeError as wrong:
        return f"{path} is not UTF-8 text (byte {wrong.start}); re-save it as UTF-8"
    return f"{path} is not JSON: {error}; a file with one record per line must end in .jsonl"


def _parquet_lines(path: Path, content: bytes) -> bytes:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from error
    lines = BytesIO()
    try:
        file = pq.ParquetFile(BytesIO(content))
        schema = file.schema_arrow
        if "conversations" not in schema.names:
            raise DataError(f"{path} has no column 'conversations', only {', '.join(schema.names) or 'none'}")
        for name in {"id", "image"} & set(schema.names):
            _check_column(path, name, schema.field(name).type)
        for batch in file.iter_batches(columns=[name for name in _COLUMNS if name in schema.names]):
            for row in batch.to_pylist():
                if isinstance(row["conversations"], str):
                    row["conversations"] = _turns_of_text(row["conversations"])
                # Bytes and the like are no part of a record; validation refuses their text by the record's name.
                lines.write(json.dumps(row, default=repr).encode() + b"\n")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file that can be read: {error}") from error
    return lines.getvalue()


def _check_column(path: Path, name: str, kind: Any) -> None:
    """Refuses columns of other types than JSON records have; images in the file itself are what is met in practice."""
    from pyarrow import types

    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)
    if name == "id":
        if not (is_text or types.is_integer(kind)):
            raise DataError(f"{path}: the column 'id' holds {kind}, where text or whole numbers are expected")
    elif not (is_text or ((types.is_list(kind) or types.is_large_list(kind)) and types.is_string(kind.value_type))):
        raise DataError(
            f"{path}: the column 'image' holds {kind}, where paths or lists of paths are expected; write images that "
            "are in the file to files of their own"
        )


def _turns_of_text(text: str) -> Any:
    """Turns that a column holds as JSON text; what is none stays text, which validation refuses by name."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


__all__ = ["PlacedRecord", "RecordText", "parse_text", "read_records", "read_text", "scan"]
