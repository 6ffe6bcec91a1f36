"""JSON lines that a killed process continues, e.g. the answers to a benchmark's questions."""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from avg_llava.common.files import encode_json, write_bytes, write_json

logger = logging.getLogger(__name__)


class JsonLines:
    """A file of JSON values, one per line, to which values are appended as soon as they are computed."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[Any]:
        """The values of all lines; a last line cut short by a kill is removed from the file.

        Raises:
            ValueError: A line is not JSON.
        """
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            os.truncate(self.path, len(complete))
        # Not `str.splitlines`, which also splits at U+2028 and other separators inside JSON strings.
        lines = complete.split(b"\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise ValueError(f"{self.path} holds a line that is not JSON ({error}); remove the file") from error

    def read_by_id(self) -> dict[str, dict[str, Any]]:
        """The objects of all lines by their field `id`; of equal ids, the last. Errors as of `read`."""
        return {line["id"]: line for line in self.read()}

    def write(self, values: Iterable[Any]) -> None:
        """Replaces the file by one line per value, atomically."""
        write_bytes(self.path, b"".join(map(_to_line, values)))

    def append(self, values: Iterable[Any]) -> None:
        """Appends one line per value; they are in the file when the call returns."""
        lines = b"".join(map(_to_line, values))
        with self.path.open("ab") as file:
            file.write(lines)


def _to_line(value: Any) -> bytes:
    return encode_json(value, ensure_ascii=False) + b"\n"


def open_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Creates a folder of `.jsonl` files, or deletes those in it that depend on anything else than `identity`.

    The identity is all that the lines depend on (hashes of weights and questions, settings), kept in `identity.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "identity.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) == identity:
        return
    stale = sorted(folder.glob("*.jsonl"))
    if stale:
        logger.warning("weights, questions or settings have changed: the answers in %s are computed again", folder)
    for file in stale:
        file.unlink()
    write_json(path, identity)
