"""open_clip towers, in a process of their own.

open_clip needs torchvision, of which there is no CPU build: importing it fails for want of two operators, and a
torchvision that cannot be imported breaks transformers. `scripts/setup.sh` installs both into a folder that is on the
path of no other test, and the process declares the operators, which nothing calls, before anything is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from avg_llava.model.open_clip_tower import OpenClipVisionConfig
from tests.tiny import tiny_model

FOLDER = Path(sys.prefix) / "open_clip"
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
import pytest
import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_towers_in_a_process_that_has_open_clip():
    assert (FOLDER / "open_clip").is_dir(), f"{FOLDER} is missing: run `bash scripts/setup.sh`"
    path = os.pathsep.join([str(FOLDER), str(ROOT)])
    cases = ROOT / "tests" / "checkpoints" / "open_clip_cases.py"
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(cases)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in ", process.stdout, re.MULTILINE), process.stdout


def test_without_open_clip_the_error_says_what_to_install():
    sizes = {"image_size": 32, "patch_size": 4, "width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 2.0}
    with pytest.raises(ValueError, match=r"needs open_clip .*: pip install 'avg-llava\[open_clip\]'"):
        tiny_model(vision=OpenClipVisionConfig(vision_cfg=sizes))


def test_configurations_are_checked():
    with pytest.raises(Exception, match="vision_cfg of an open_clip tower lacks image_size, patch_size"):
        OpenClipVisionConfig(vision_cfg={"width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 2.0})
