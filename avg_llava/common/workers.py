"""Worker processes that load something large, such as a model, once and use it for many items."""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from avg_llava.common.machine import num_cores

POLL_SECONDS = 0.2
PARENT_POLL_SECONDS = 1.0
MAX_DEFAULT_WORKERS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Reports that so many more units of work are done."""
Work = Callable[[Item, Advance], Result]
"""Processes one item and reports its progress."""

_work: list[Any] = []  # in a worker: the function that `start` returned, and the shared counter of finished units


class WorkerError(RuntimeError):
    """A worker process was killed."""


def default_workers() -> int:
    """One process per GPU, or one per core, at most eight, if there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(MAX_DEFAULT_WORKERS, num_cores())


def run_in_workers(
    start: Callable[..., Work[Item, Result]],
    start_arguments: tuple[Any, ...],
    items: Sequence[Item],
    num_workers: int,
    advance: Advance,
) -> Iterator[Result]:
    """Yields the results of all items as they are finished.

    Args:
        start: Called once in each worker with the worker's number and `start_arguments`; returns the function that
            processes an item. Must be picklable.
        num_workers: Number of processes. With one, the items are processed in order in this process.
        advance: Called in this process with the units that workers have reported since the last call.

    Raises:
        BrokenProcessPool: A worker was killed.
    """
    if num_workers == 1:
        work = start(0, *start_arguments)
        for item in items:
            yield work(item, advance)
        return
    context = multiprocessing.get_context("spawn")  # torch may hang in forked processes
    numbers, done = context.Value("l", 0), context.Value("l", 0)
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (start, start_arguments, numbers, done))
    reported = 0
    try:
        pending = {pool.submit(_run, item) for item in items}
        while pending:
            finished, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
            now = done.value
            advance(now - reported)
            reported = now
            for future in finished:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def map_batches(
    start: Callable[[str], Callable[[Item], Result]], batches: Sequence[Item], num_workers: int
) -> Iterator[Result]:
    """Yields the results of all batches as they are finished.

    Args:
        start: Called once in each process with its device, e.g. to load a model; returns the function that processes a
            batch. Must be picklable.
        num_workers: Number of processes, to which GPUs are assigned in turn.

    Raises:
        WorkerError: A process was killed.
    """
    try:
        yield from run_in_workers(_start_on_device, (start,), batches, num_workers, advance=lambda units: None)
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker process was killed, perhaps because memory ran out; run again with --workers 1, which keeps the "
            "answers computed so far"
        ) from error


def end_with_parent() -> None:
    """Ends this process within seconds after its parent process has ended, e.g. because it was killed.

    `torchrun` starts its ranks in new sessions, so `kill -9` of it, or of the script around it, leaves them
    training. A second call of the same command would then write to the same folder as they do.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _start_worker(start: Callable[..., Any], start_arguments: tuple[Any, ...], numbers: Any, done: Any) -> None:
    end_with_parent()
    with numbers.get_lock():
        number = numbers.value
        numbers.value += 1
    if number > 0:
        logging.disable(logging.WARNING)  # the first worker gives the same warnings
    _work[:] = start(number, *start_arguments), done
    logging.disable(logging.NOTSET)


def _run(item: Any) -> Any:
    work, done = _work

    def advance(units: int) -> None:
        with done.get_lock():
            done.value += units

    return work(item, advance)


def _start_on_device(number: int, start: Callable[[str], Callable[[Item], Result]]) -> Work:
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the other workers use the other cores
    num_gpus = torch.cuda.device_count()
    process = start(f"cuda:{number % num_gpus}" if num_gpus else "cpu")
    return lambda batch, advance: process(batch)
