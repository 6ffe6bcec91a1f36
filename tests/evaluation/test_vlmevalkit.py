"""The VLMEvalKit script without VLMEvalKit: conversion of messages to requests, and usage."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "vlmevalkit.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("vlmevalkit", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_images_keep_their_positions(script):
    message = [
        {"type": "text", "value": "Compare "},
        {"type": "image", "value": "a.png"},
        {"type": "text", "value": " with "},
        {"type": "image", "value": "b.png"},
    ]
    request = script.to_request(message)
    assert request.prompt == "Compare <image>\n with <image>\n"
    assert request.images == (Path("a.png"), Path("b.png"))


def test_video_is_refused(script):
    with pytest.raises(ValueError, match="reads images and text, not video"):
        script.to_request([{"type": "video", "value": "a.mp4"}])


def test_missing_kit_is_named(tmp_path):
    command = [sys.executable, SCRIPT, "--kit", tmp_path, "--model", "DIR"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--kit names a clone of VLMEvalKit" in result.stderr
