"""LLaVA's records: turning each into a validated sample or an error that names it."""

import ntpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from avg_llava.model.images import DataError
from avg_llava.model.processing import IMAGE_PLACEHOLDER

HUMAN, ASSISTANT = "human", "gpt"


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance: `role` is "human" or "gpt"."""

    role: str
    value: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One validated record.

    Attributes:
        id: The record's id as text, or its position where it has none.
        images: Paths below `image_root`, in the order of the placeholders.
        turns: Every turn of the record, also a leading one of the model that templates leave out.
        image_root: Folder that image paths must stay inside of.
        source: File and position, for messages.
    """

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    image_root: Path
    source: str

    @property
    def name(self) -> str:
        """How messages call the sample."""
        return f"sample {self.id!r} ({self.source})"


class RawRecord(NamedTuple):
    """One entry of a file before validation; `error` instead of `value` where the line is not JSON.

    `position` is its index in a list or its row in a Parquet file, or its line in a `.jsonl` file, counted from 1.
    """

    value: Any
    source: str
    position: int
    error: str | None = None


def parse_record(record: Any, image_root: str | Path, source: str = "record") -> Sample:
    """Validates one record.

    A record with exactly one image and no `<image>` in its text is taken to mean the image before the first question;
    otherwise there must be as many placeholders as images, all in human turns.

    Args:
        record: `{"id": ..., "image": str | list (absent for text), "conversations": [{"from": ..., "value": ...}]}`.
            Other keys are ignored.
        image_root: Folder that image paths are relative to.
        source: Where the record stands, for messages.

    Raises:
        DataError: Names the record and what is wrong with it.
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
        turns = _with_placeholder(_turns(record.get("conversations")), len(images))
        _check_placeholders(turns, len(images))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    return Sample(str(identity) if identity is not None else source, images, turns, root, source)


def dialogue(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns that are learnt from: human first, then alternating.

    As in the original code, a leading turn of the model is dropped, and roles must alternate from there on.

    Raises:
        DataError: Nothing is left, or roles do not alternate.
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


def _turns(conversations: Any) -> tuple[Turn, ...]:
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


def image_paths(image: Any) -> list[str]:
    """A record's image paths, which stay below their root.

    Raises:
        DataError: They are no path and no list of paths, or one leaves the root.
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


def _with_placeholder(turns: tuple[Turn, ...], num_images: int) -> tuple[Turn, ...]:
    if num_images != 1 or any(IMAGE_PLACEHOLDER in turn.value for turn in turns):
        return turns
    first = next(index for index, turn in enumerate(turns) if turn.role == HUMAN)
    question = Turn(HUMAN, f"{IMAGE_PLACEHOLDER}\n{turns[first].value}")
    return (*turns[:first], question, *turns[first + 1 :])


def _check_placeholders(turns: tuple[Turn, ...], num_images: int) -> None:
    if any(IMAGE_PLACEHOLDER in turn.value for turn in turns if turn.role == ASSISTANT):
        raise DataError(f"an answer holds the text {IMAGE_PLACEHOLDER}, which only human turns may; reword the answer")
    num_placeholders = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in turns)
    if num_placeholders != num_images:
        raise DataError(
            f"{num_images} images but {num_placeholders} {IMAGE_PLACEHOLDER} placeholders; write one per image"
        )


__all__ = [
    "DataError",
    "RawRecord",
    "Sample",
    "Turn",
    "dialogue",
    "image_paths",
    "parse_record",
]
