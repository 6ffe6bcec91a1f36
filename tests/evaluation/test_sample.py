"""The shipped mini model on the mini world's benchmarks, against scores computed by hand."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from avg_llava.cli import main
from avg_llava.evaluation.benchmarks import BENCHMARKS

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = ROOT / "eval" / "expected" / "sample.json"


def _evaluate(data, output, benchmark, check):
    model = ROOT / "avg_llava" / "mini" / "checkpoint"
    arguments = ["--benchmark", benchmark, "--model", model, "--data", data, "--output", output, "--check", check]
    return main(["evaluate", *map(str, arguments), "--workers", "1", "--timed", "0"])


def test_scores_computed_by_hand(data, tmp_path, capsys):
    assert _evaluate(data, tmp_path, "all", EXPECTED) == 0, capsys.readouterr().out
    assert {entry["benchmark"] for entry in json.loads(EXPECTED.read_text())} == set(BENCHMARKS)
    # Answers are stored, so the second comparison does not run the model.
    entries = json.loads(EXPECTED.read_text())
    next(entry for entry in entries if entry["benchmark"] == "gqa")["published"] += 1
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(entries))
    assert _evaluate(data, tmp_path, "gqa", changed) == 1
    assert "differs from what is expected: gqa exact_match" in capsys.readouterr().out


@pytest.mark.slow
def test_the_sample_script(tmp_path):
    """The README's command, to tables and figures."""
    command = ["bash", "eval/all.sh", "--sample", "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=1200)
    assert (tmp_path / "report" / "index.html").is_file()
