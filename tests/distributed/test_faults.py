"""Two ZeRO-3 processes on data with every fault there is: none holds them up, and each is named in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from avg_llava.training.checkpoint import read_manifest
from tests.datasets.faults import MALFORMED, UNREADABLE, USED, WITHOUT_FAULT, write_faults
from tests.distributed.test_deepspeed import PATIENCE, ROOT
from tests.tiny import make_checkpoint, stage_values

pytestmark = [pytest.mark.timeout(2 * PATIENCE), pytest.mark.xdist_group("distributed")]


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Path:
    """A folder with data, and a checkpoint to start from."""
    folder = tmp_path_factory.mktemp("faults")
    write_faults(folder, tmp_path_factory.mktemp("outside"))
    make_checkpoint(folder / "start")
    return folder


def train(faults: Path, root: Path, on_bad_sample: str) -> subprocess.CompletedProcess[str]:
    """Stage 3, one sample per process and step, so that every fault meets one process only."""
    values = stage_values(3, root, faults)
    values["model"] = {"start": str(faults / "start/model"), "force_start": True, "max_length": 600}
    values["data"] |= {
        "sources": [{"path": str(faults / "data.json")}],
        "on_bad_sample": on_bad_sample,
        "num_workers": 1,
        "group_by_modality_length": False,
    }
    values["optim"] |= {"global_batch_size": 2, "micro_batch_size": 1, "max_steps": None}
    values["runtime"]["deepspeed"] = str(ROOT / "configs/deepspeed/zero3.json")
    path = root / "stage3.yaml"
    path.write_text(yaml.safe_dump(values))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launch, "-m", "avg_llava.training.run", str(path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def lines_naming(identity: str, finished: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in finished.stderr.splitlines() if f"sample {identity!r} (" in line]


def test_skipped(faults, tmp_path):
    finished = train(faults, tmp_path, "skip")
    assert finished.returncode == 0, finished.stderr[-5000:]
    assert read_manifest(tmp_path / "stage3").finished
    history = [json.loads(line) for line in (tmp_path / "stage3/log_history.jsonl").read_text().splitlines()]
    steps = [line["loss"] for line in history if "loss" in line]
    assert len(steps) == (len(UNREADABLE) + len(USED) + len(WITHOUT_FAULT)) / 2
    assert max(steps) > 0
    for identity in MALFORMED:  # each process reads the list
        assert len(lines_naming(identity, finished)) == 2, finished.stderr[-5000:]
        assert all("malformed record left out" in line for line in lines_naming(identity, finished))
    for identity in UNREADABLE:
        (line,) = lines_naming(identity, finished)
        assert re.search(r"unreadable sample masked: .*\.(jpg|png)", line)
    (line,) = lines_naming("over-long", finished)
    assert "over-long sample cut" in line
    cut, masked = lines_naming("masked", finished)
    assert "over-long sample cut" in cut
    assert "sample without supervised tokens" in masked
    assert not any(lines_naming(identity, finished) for identity in WITHOUT_FAULT)


def test_refused(faults, tmp_path):
    finished = train(faults, tmp_path, "error")
    assert finished.returncode != 0
    assert read_manifest(tmp_path / "stage3") is None
    assert "3 malformed records; correct them or set on_bad_sample to skip" in finished.stderr
    for identity in MALFORMED:
        assert lines_naming(identity, finished), finished.stderr[-5000:]
    assert not (tmp_path / "stage3/log_history.jsonl").exists(), "before the first step"
