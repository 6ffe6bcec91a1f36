"""Work shared out to processes that keep something large, such as a model, from one piece of work to the next."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any, TypeVar

from avg_llava.common.watchdog import end_with_parent

SECONDS_BETWEEN_LOOKS = 0.2

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]
Work = Callable[[Item, Advance], Result]
"""Does one piece of work, and says now and then how much of it is done."""

_work: list[Any] = []  # in a worker: what `start` gave, and the counter of what is done


def run_in_workers(
    start: Callable[..., Work[Item, Result]],
    start_arguments: tuple[Any, ...],
    items: Sequence[Item],
    num_workers: int,
    advance: Advance,
) -> Iterator[Result]:
    """Results of all items, as they come; with one worker, of this process, in order.

    Args:
        start: Called in each worker with its number and `start_arguments`; gives the function that does the work.
        start_arguments: Passed on to the workers.
        items: The pieces of work.
        num_workers: Processes.
        advance: Called here with what the workers have reported since the last call.

    Raises:
        BrokenProcessPool: A worker was killed.
    """
    if num_workers == 1:
        work = start(0, *start_arguments)
        for item in items:
            yield work(item, advance)
        return
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    numbers, done = context.Value("l", 0), context.Value("l", 0)
    pool = ProcessPoolExecutor(num_workers, context, _start, (start, start_arguments, numbers, done))
    reported = 0
    try:
        waiting = {pool.submit(_run, item) for item in items}
        while waiting:
            finished, waiting = wait(waiting, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            now = done.value
            advance(now - reported)
            reported = now
            for future in finished:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(start: Callable[..., Any], start_arguments: tuple[Any, ...], numbers: Any, done: Any) -> None:
    end_with_parent()
    with numbers.get_lock():
        number = numbers.value
        numbers.value += 1
    _work[:] = start(number, *start_arguments), done


def _run(item: Any) -> Any:
    work, done = _work

    def advance(amount: int) -> None:
        with done.get_lock():
            done.value += amount

    return work(item, advance)


__all__ = ["Advance", "Work", "run_in_workers"]
