"""Continuing a DeepSpeed run with another number of processes.

Each process of ZeRO writes its share of the optimizer's state, which no other number of processes can read. DeepSpeed's
universal format holds each parameter's state whole; a checkpoint is converted to it before it is continued. The samples
and their order stay the same, since the global batch does; only dropout's masks are drawn anew.
"""

import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from avg_llava.common.settings import ConfigError
from avg_llava.training.processes import rank

logger = logging.getLogger(__name__)

LOAD_UNIVERSAL: dict[str, Any] = {"checkpoint": {"load_universal": True}}
"""What to add to DeepSpeed's settings to continue from a converted checkpoint."""
_DONE_NAME, _POLL_SECONDS = "universal.done", 0.2


def make_universal(checkpoint: Path) -> None:
    """Convert a checkpoint for any number of processes, beside what it holds already; once.

    The first process converts, before the processes are joined: no time-out of theirs runs while large files are
    written. The others wait for its mark in the folder, which all nodes must see, as they must to load it.

    Args:
        checkpoint: Folder with DeepSpeed's `latest` and the folder that it names.

    Raises:
        ConfigError: The conversion failed; the last line that DeepSpeed wrote is in the message.
    """
    done = checkpoint / _DONE_NAME
    if rank() != 0:
        while not done.is_file():  # should the first process fail, the launcher ends this one
            time.sleep(_POLL_SECONDS)
        return
    if done.is_file():
        return
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    universal = checkpoint / f"{tag}_universal"
    shutil.rmtree(universal, ignore_errors=True)  # of a conversion that was killed
    logger.info("converting %s for another number of processes", checkpoint / tag)
    folders = ["--input_folder", str(checkpoint / tag), "--output_folder", str(universal)]
    converted = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--inject_missing_state"],
        capture_output=True,
        text=True,
        check=False,
    )
    if converted.returncode != 0:
        last = (converted.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(
            f"{checkpoint} could not be converted for another number of processes ({last}). Run it with as many "
            "processes as wrote it, or pass --output.overwrite to train from the beginning"
        )
    (checkpoint / "latest_universal").write_text(universal.name, encoding="utf-8")
    done.touch()
