"""Worker processes: a rank whose launcher is killed ends, results come from several processes."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from avg_llava.common.workers import WorkerError, map_batches, run_in_workers

CHILD = """
import os, time
from avg_llava.common.workers import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True).wait()
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # a zombie is not running either
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_child_ends_with_its_killed_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 60
        while is_running(child) and time.monotonic() < deadline:
            time.sleep(0.2)
        survived = is_running(child)
        if survived:
            os.kill(child, signal.SIGKILL)
        assert not survived


def start(number: int, factor: int):
    def work(item: int, advance) -> int:
        advance(2)
        return factor * item

    return work


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_and_progress(num_workers):
    reports: list[int] = []
    results = run_in_workers(start, (10,), range(5), num_workers, reports.append)
    assert sorted(results) == [0, 10, 20, 30, 40]
    assert sum(reports) == 10


def kill(batch: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def load(device: str):
    return kill


def wait_for_others(batch: int) -> int:
    time.sleep(0.5)
    return batch


def load_with_warning(device: str):
    logging.getLogger("load").warning("a new router is initialised")
    return wait_for_others


def test_warnings_while_workers_start_come_once(capfd):
    assert sorted(map_batches(load_with_warning, range(6), 3)) == list(range(6))
    assert capfd.readouterr().err.count("a new router is initialised") == 1


def test_a_killed_worker_is_an_error_that_names_the_remedy():
    with pytest.raises(WorkerError, match="--workers 1"):
        list(map_batches(load, [0], 2))
