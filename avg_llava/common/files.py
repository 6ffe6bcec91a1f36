"""Files that appear whole or not at all, and SHA-256 hashes of content."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_write(path: Path, concurrent: bool = False) -> Iterator[Path]:
    """Yields the path of a temporary file beside `path`, which replaces `path` on success and is removed on failure.

    The folder must exist. With `concurrent`, several processes may write the file at the same time. The temporary file
    of a killed process stays; its name is `.<name>.new`, with the process id before `new` if `concurrent`.
    """
    infix = f".{os.getpid()}" if concurrent else ""
    temporary = path.with_name(f".{path.name}{infix}.new")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def encode_json(value: Any, **options: Any) -> bytes:
    """UTF-8 of `json.dumps(value, **options)`; a lone surrogate of a path that is not UTF-8 becomes its JSON escape."""
    # Surrogates occur only inside strings, where Python's escape of one is also JSON's.
    return json.dumps(value, **options).encode("utf-8", "backslashreplace")


def write_json(path: Path, content: Any, concurrent: bool = False, indent: int = 2, **options: Any) -> None:
    """Writes a value as an indented JSON file that ends in a newline, atomically; `options` as in `encode_json`."""
    text = encode_json(content, indent=indent, **options)
    with atomic_write(path, concurrent) as temporary:
        temporary.write_bytes(text + b"\n")


def hash_bytes(content: bytes) -> str:
    """SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def hash_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of the concatenation of chunks of bytes."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(content: Any, default: Callable[[Any], Any] | None = None) -> str:
    """SHA-256 of a value's JSON text with sorted keys; `default` as in `json.dumps`."""
    return hash_bytes(json.dumps(content, sort_keys=True, default=default).encode())
