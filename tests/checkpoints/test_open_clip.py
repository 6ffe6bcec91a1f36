"""open_clip towers, in a process of their own; see `tests/open_clip_process.py`."""

import re
from pathlib import Path

import pytest

from avg_llava.model.open_clip_tower import OpenClipVisionConfig
from tests.open_clip_process import run_with_open_clip
from tests.tiny import tiny_model

CASES = Path(__file__).parent / "open_clip_cases.py"


def test_towers_in_a_process_that_has_open_clip():
    process = run_with_open_clip("pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(CASES))
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in ", process.stdout, re.MULTILINE), process.stdout


def test_without_open_clip_the_error_says_what_to_install():
    sizes = {"image_size": 32, "patch_size": 4, "width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 2.0}
    with pytest.raises(ValueError, match=r"needs open_clip .*: pip install 'avg-llava\[open_clip\]'"):
        tiny_model(vision=OpenClipVisionConfig(vision_cfg=sizes))


def test_configurations_are_checked():
    with pytest.raises(Exception, match="vision_cfg of an open_clip tower lacks image_size, patch_size"):
        OpenClipVisionConfig(vision_cfg={"width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 2.0})
