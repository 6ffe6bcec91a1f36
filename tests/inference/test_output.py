"""Commands print their answer and this package's messages, and nothing from libraries."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from avg_llava.checkpoints.checkpoint import ROUTER_KEYS, rename_keys

MINI = Path(__file__).resolve().parents[2] / "avg_llava" / "mini" / "checkpoint"
QUESTION = ("--prompt", "what color is the background?", "--max-new-tokens", "2")


def generate(*arguments):
    command = [sys.executable, "-m", "avg_llava.cli", "generate", *map(str, arguments), *QUESTION]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("quantization", [(), ("--quantization", "4bit")])
def test_generate_prints_the_answer_only(quantization):
    done = generate("--model", MINI, *quantization)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_a_fresh_router_is_one_line(tmp_path):
    folder = shutil.copytree(MINI, tmp_path / "next")
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"model_type": "llava_next"})
    )
    weights = rename_keys(load_file(folder / "model.safetensors"), [(rf"^{ROUTER_KEYS}", None)])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    done = generate("--model", folder)
    assert done.stderr == (
        f"avg_llava.checkpoints.loading: model.router.* is not in {folder}: a new router is initialised; train it in "
        "stage 4, or force a level (granularity)\n"
    )


def test_importing_the_trainer_prints_nothing():
    code = "import avg_llava, peft, transformers.trainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gemm_4bit_forward" not in done.stdout + done.stderr
