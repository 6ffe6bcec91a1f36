"""A rank whose launcher is killed ends by itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WATCHDOG = Path(__file__).resolve().parents[2] / "avg_llava" / "training" / "watchdog.py"
# Read from its file, without the package around it, which takes seconds to import.
CHILD = f"""
import os, runpy, time
runpy.run_path({str(WATCHDOG)!r})["end_with_parent"]()
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
    with open(f"/proc/{pid}/stat") as file:  # a zombie that nobody has waited for is not running either
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
