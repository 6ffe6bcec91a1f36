"""The commands of docs/finetuning.md, run as they stand there in a folder that looks like the project's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from avg_llava.training.checkpoint import read_manifest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/finetuning.md").read_text("utf-8"), flags=re.DOTALL)
NUM_BEFORE_TRAINING = 3  # data, configuration, verification and dry run


@pytest.fixture
def project(tmp_path) -> Path:
    for name in ("avg_llava", "configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def _run(project: Path, blocks: list[str]) -> str:
    """What the commands write to standard output; the first that fails ends them."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NPROC_PER_NODE": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_up_to_the_dry_run(project):
    told = _run(project, BLOCKS[:NUM_BEFORE_TRAINING])
    assert "train.json: 32 records" in told
    assert "32 samples; of 32 checked 0 cannot be read" in told
    assert told.endswith("dry run: no problems\n")
    assert not (project / "runs/own/stage3").exists()


@pytest.mark.slow
def test_the_whole_page(project):
    told = _run(project, BLOCKS)
    for stage in (3, 4):
        assert read_manifest(project / f"runs/own/stage{stage}").finished
    lines = (project / "runs/own/stage3/log_history.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    answer = json.loads(told[told.rindex("\n{\n") :])
    assert answer["granularity"] in (4, 8, 16, 32, 64)
    assert answer["text"]
