"""A process that has open_clip and torchvision.

open_clip needs torchvision, of which there is no CPU build: importing it fails for want of two operators, and a
torchvision that cannot be imported breaks transformers. `scripts/setup.sh` installs both into a folder that is on the
path of no other process, and this one declares the operators, which nothing calls, before anything is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(sys.prefix) / "open_clip"
ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import runpy
import sys
import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def run_with_open_clip(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module arguments` with open_clip, and returns its output."""
    assert (FOLDER / "open_clip").is_dir(), f"{FOLDER} is missing: run `bash scripts/setup.sh`"
    path = os.pathsep.join([str(FOLDER), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, module, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
