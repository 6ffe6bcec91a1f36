"""Batches answered by several processes, and answers that outlive a killed run.

Answers are lines of JSON, appended as soon as they are there. What they depend on stands beside them, so that
answers of other weights or questions are never taken for these.
"""

import hashlib
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch

from avg_llava.common.machine import num_cores
from avg_llava.common.workers import Work, run_in_workers

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Lines = TypeVar("Lines")


class WorkerError(RuntimeError):
    """A process that answers was killed."""


def default_workers() -> int:
    """One process per GPU, else one per core, at most eight."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(8, num_cores())


def map_batches(
    start: Callable[[str], None],
    answer: Callable[[Batch], Lines],
    batches: Sequence[Batch],
    num_workers: int,
) -> Iterator[Lines]:
    """What `answer` makes of each batch, as soon as it is there: in this process, or in several.

    Args:
        start: Called once in each process, with its device: loads what `answer` needs. Both must be picklable.
        answer: Called for each batch.
        batches: The batches.
        num_workers: Processes; GPUs are handed out in turn.

    Raises:
        WorkerError: a process was killed.
    """
    try:
        yield from run_in_workers(_start, (start, answer), batches, num_workers, advance=lambda amount: None)
    except BrokenProcessPool as error:
        raise WorkerError(
            "a process that answers was killed, perhaps for want of memory; run again with --workers 1, which keeps "
            "the answers that are there"
        ) from error


def _start(number: int, start: Callable[[str], None], answer: Callable[[Batch], Lines]) -> Work[Batch, Lines]:
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the others have the other cores
    num_gpus = torch.cuda.device_count()
    start(f"cuda:{number % num_gpus}" if num_gpus else "cpu")
    return lambda batch, advance: answer(batch)


# ---- the store of answers -----------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_store(folder: Path, identity: Mapping[str, Any]) -> None:
    """Makes a folder for answers, and empties it of those that belong to another `identity`."""
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "identity.json"
    if known.exists() and json.loads(known.read_text()) == identity:
        return
    stale = sorted(folder.glob("*.jsonl"))
    if stale:
        logger.warning("weights, questions or settings have changed: the answers in %s are made anew", folder)
    for path in stale:
        path.unlink()
    known.write_text(json.dumps(identity, indent=2) + "\n")


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of one file by their `id`; a last line cut short by a kill is dropped from the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    return {line["id"]: line for line in lines}


__all__ = ["WorkerError", "default_workers", "hash_file", "map_batches", "open_store", "read_answers"]
