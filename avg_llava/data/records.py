"""LLaVA records: reading files of them, and turning each record into a validated sample or an error that names it."""

import contextlib
import json
import ntpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from avg_llava.common.files import hash_bytes
from avg_llava.model.images import DataError
from avg_llava.model.templates import IMAGE_PLACEHOLDER

HUMAN, ASSISTANT = "human", "gpt"

_COLUMNS = ("id", "image", "conversations")
_RECORD_NOUNS = {".jsonl": "line", ".parquet": "row"}  # for messages; "record" for other files
_FIRST_POSITION = {".jsonl": 1, ".parquet": 0}
_UTF8_MARK = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance of a conversation: `role` is "human" or "gpt"."""

    role: str
    value: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A validated record. `source` is its file and position, which replace a missing id.

    `images` are paths below `image_root`, in the order of the placeholders. `turns` includes a leading one of the
    model, which templates leave out.
    """

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    image_root: Path
    source: str

    @property
    def name(self) -> str:
        """Id and source, for messages."""
        return f"sample {self.id!r} ({self.source})"


class RawRecord(NamedTuple):
    """One entry of a file before validation; if its text is not JSON, `value` is None and `error` the reason.

    `position` is the index in a JSON list (from 0), row of a Parquet file (from 0) or line of a `.jsonl` file (from 1),
    and `source` names it with its file.
    """

    value: Any
    source: str
    position: int
    error: str | None = None


class RecordFile(NamedTuple):
    """A file of records: hash of its bytes, and its text (the bytes or, for Parquet, one JSON object per line)."""

    path: Path
    sha256: str
    text: bytes


# ---- files of records ---------------------------------------------------------------------------------------------


def read_records(path: str | Path) -> list[RawRecord]:
    """Reads all records of a `.jsonl` file, a `.parquet` file or, with any other suffix, a JSON list.

    Raises:
        DataError: The file is missing, is not UTF-8, is not JSON, or is not a list.
    """
    return [record for record, _, _ in scan_records(read_file(path))]


def read_file(path: str | Path) -> RecordFile:
    """Reads a file of records, and converts the columns `id`, `image` and `conversations` of Parquet to JSON lines.

    Raises:
        DataError: The file is missing, or is not a Parquet file with these columns.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check data.sources") from error
    text = _parquet_to_lines(path, content) if path.suffix == ".parquet" else content
    return RecordFile(path, hash_bytes(content), text)


def scan_records(file: RecordFile) -> Iterator[tuple[RawRecord, int, int]]:
    """Yields each record of a file with the offset and size of its text in bytes.

    A line that is not JSON becomes a record with an error.

    Raises:
        DataError: A list is not UTF-8, is not JSON, or is not a list.
    """
    return _scan_lines(file) if file.path.suffix in _FIRST_POSITION else _scan_list(file)


def decode_record(path: Path, position: int, text: bytes) -> RawRecord:
    """Parses the text of one record of a file."""
    try:
        return RawRecord(json.loads(text.decode()), _source(path, position), position)
    except (ValueError, RecursionError) as error:
        return RawRecord(None, _source(path, position), position, f"not JSON: {error}")


def _source(path: Path, position: int) -> str:
    return f"{path}, {_RECORD_NOUNS.get(path.suffix, 'record')} {position}"


def _scan_lines(file: RecordFile) -> Iterator[tuple[RawRecord, int, int]]:
    """Yields the records of JSON lines. Blank lines count as positions but are no records."""
    text, position = file.text, _FIRST_POSITION[file.path.suffix]
    begin = len(_UTF8_MARK) if text.startswith(_UTF8_MARK) else 0
    while begin < len(text):
        end = text.find(b"\n", begin)
        end = len(text) if end < 0 else end
        line = text[begin:end]
        if line.strip():
            yield decode_record(file.path, position, line), begin, len(line)
        begin, position = end + 1, position + 1


def _scan_list(file: RecordFile) -> Iterator[tuple[RawRecord, int, int]]:
    """Yields the elements of a JSON list.

    The bytes are scanned as Latin-1, where one byte is one character, so that offsets in the text are offsets in the
    file. Elements that are not ASCII are then parsed again as UTF-8.
    """
    path = file.path
    text = str(file.text, "latin-1")
    decode = json.JSONDecoder().raw_decode

    def skip_space(offset: int) -> int:
        match = _SPACE.match(text, offset)
        assert match is not None, "the pattern matches the empty string"
        return match.end()

    try:
        offset = skip_space(len(_UTF8_MARK) if file.text.startswith(_UTF8_MARK) else 0)
        if text[offset : offset + 1] != "[":
            value = json.loads(text[offset:])
            raise DataError(f"{path} holds a {type(value).__name__}, but a list of records is expected")
        offset, position = skip_space(offset + 1), 0
        has_next = text[offset : offset + 1] != "]"
        while has_next:
            value, end = decode(text, offset)
            element = file.text[offset:end]
            if not element.isascii():
                value = json.loads(element.decode())
            yield RawRecord(value, _source(path, position), position), offset, end - offset
            position += 1
            offset = skip_space(end)
            has_next = text[offset : offset + 1] == ","
            if has_next:
                offset = skip_space(offset + 1)
        if text[offset : offset + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, offset)
        if skip_space(offset + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, skip_space(offset + 1))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(_describe_bad_list(file, error)) from error


def _describe_bad_list(file: RecordFile, error: Exception) -> str:
    """Reason why a file is not a JSON list: its encoding, or the JSON error."""
    try:
        file.text.decode()
    except UnicodeDecodeError as wrong:
        return f"{file.path} is not UTF-8 text (byte {wrong.start}); re-save it as UTF-8"
    return f"{file.path} is not JSON: {error}; a file with one record per line must end in .jsonl"


def _parquet_to_lines(path: Path, content: bytes) -> bytes:
    """Converts the rows of a Parquet file to JSON lines."""
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
                if isinstance(row["conversations"], str):  # JSON text; validation refuses other text by name
                    with contextlib.suppress(ValueError, RecursionError):
                        row["conversations"] = json.loads(row["conversations"])
                # Values that JSON cannot hold become their repr, which validation refuses by the record's name.
                lines.write(json.dumps(row, default=repr).encode() + b"\n")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file that can be read: {error}") from error
    return lines.getvalue()


def _check_column(path: Path, name: str, kind: Any) -> None:
    """Refuses a column whose type no JSON record has, such as images embedded in the file."""
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


# ---- one record ---------------------------------------------------------------------------------------------------


def parse_record(record: Any, image_root: str | Path, source: str = "record") -> Sample:
    """Validates one record.

    The image of a record with exactly one image and no `<image>` in its text is put before the first question;
    otherwise there must be as many placeholders as images, all in human turns.

    Args:
        record: `{"id": ..., "image": str | list (absent for text), "conversations": [{"from": ..., "value": ...}]}`.
            Other keys are ignored.

    Raises:
        DataError: The record is invalid; the message names it and the reason.
    """
    if not isinstance(record, dict):
        raise DataError(f"{source}: a record is a JSON object, got {type(record).__name__}")
    identity = record.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, (str, int))):
        raise DataError(f"{source}: id must be text or a whole number, got {identity!r}")
    name = f"sample {str(identity)!r} ({source})" if identity is not None else source
    root = Path(image_root)
    try:
        images = tuple(root / relative for relative in image_paths(record.get("image")))
        turns = _match_placeholders(_parse_turns(record.get("conversations")), len(images))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    return Sample(str(identity) if identity is not None else source, images, turns, root, source)


def dialogue(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns used for training: human first, then alternating.

    As in the original code, a leading turn of the model is dropped, and roles must alternate from there on.

    Raises:
        DataError: There is no human turn, or roles do not alternate.
    """
    if turns and turns[0].role != HUMAN:
        turns = turns[1:]
    if not turns:
        raise DataError("conversations has no human turn")
    for index, turn in enumerate(turns):
        expected = ASSISTANT if index % 2 else HUMAN
        if turn.role != expected:
            raise DataError(f"turns must alternate between human and gpt, but two {turn.role} turns follow one another")
    return turns


def image_paths(image: Any) -> list[str]:
    """Relative image paths of a record, given the value of its key `image`.

    Raises:
        DataError: The value is neither a path nor a list of paths, or a path leaves the image root.
    """
    if image is None:
        return []
    entries = image if isinstance(image, list) else [image]
    for entry in entries:
        if not isinstance(entry, str) or not entry.strip() or "\0" in entry:
            raise DataError(f"'image' must be a path or a list of paths (absent for a text-only record), got {entry!r}")
        if entry.startswith(("/", "\\")) or ntpath.splitdrive(entry)[0] or ".." in re.split(r"[/\\]", entry):
            raise DataError(f"image path {entry!r} leaves the image root; write it relative to the root, without '..'")
    return entries


def _parse_turns(conversations: Any) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise DataError("conversations must be a list of at least one turn")
    turns = []
    for number, entry in enumerate(conversations):
        if not isinstance(entry, dict):
            raise DataError(f"turn {number} must be an object with 'from' and 'value', got {type(entry).__name__}")
        role, value = entry.get("from"), entry.get("value")
        if role not in (HUMAN, ASSISTANT):
            raise DataError(f"turn {number}: 'from' must be 'human' or 'gpt', got {role!r}")
        if not isinstance(value, str):
            raise DataError(f"turn {number}: 'value' must be text, got {value!r}")
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"turn {number}: 'value' holds half a character pair ({error.reason})") from None
        turns.append(Turn(role, value))
    dialogue(tuple(turns))
    return tuple(turns)


def _match_placeholders(turns: tuple[Turn, ...], num_images: int) -> tuple[Turn, ...]:
    """The turns with one placeholder per image; a single missing one is put before the first question."""
    num_placeholders = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in turns)
    if num_images == 1 and num_placeholders == 0:
        first = next(index for index, turn in enumerate(turns) if turn.role == HUMAN)
        question = Turn(HUMAN, f"{IMAGE_PLACEHOLDER}\n{turns[first].value}")
        return (*turns[:first], question, *turns[first + 1 :])
    if any(IMAGE_PLACEHOLDER in turn.value for turn in turns if turn.role == ASSISTANT):
        raise DataError(f"an answer holds the text {IMAGE_PLACEHOLDER}, which only human turns may; reword the answer")
    if num_placeholders != num_images:
        raise DataError(
            f"{num_images} images but {num_placeholders} {IMAGE_PLACEHOLDER} placeholders; write one per image"
        )
    return turns
