"""The commands that the scripts in eval/ start, recorded by a stand-in for `avg-llava` that prints its arguments."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.evaluation.harness import TASKS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(tmp_path):
    """Runs eval/NAME.sh in another folder, with the stand-in on the PATH."""
    (tmp_path / "avg-llava").write_text('#!/bin/sh\necho "$PWD: $*"\nexit ${FAILS:-0}\n')
    (tmp_path / "avg-llava").chmod(0o755)

    def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(ROOT / f"eval/{name}.sh"), *arguments],
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize("name", TASKS)
def test_one_benchmark(script, tmp_path, name):
    result = script(name, "--model", "my model", "--limit", "8")
    assert result.stdout == f"{tmp_path}: evaluate --benchmark {name} --model my model --limit 8\n"
    assert script(name, FAILS="3").returncode == 3


def test_there_is_a_script_for_each_benchmark():
    assert {path.stem for path in (ROOT / "eval").glob("*.sh")} == {*TASKS, "all"}


def test_all(script, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gqa.json").touch()
    result = script("all", "--model", "m", "--output", "out", "--limit", "8")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"{tmp_path}: evaluate --benchmark all --output out --model m --output out --limit 8",
        f"{tmp_path}: report out/gqa.json --output out/report",
    ]


def test_no_report_after_a_failure(script):
    result = script("all", "--model", "m", FAILS="1")
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 1


def test_sample(script):
    drawn, evaluated, reported = script("all", "--sample", "--limit", "8").stdout.splitlines()
    data = "playground/data/benchmarks"
    assert drawn == f"{ROOT}: mini benchmarks --output {data}"
    assert evaluated.startswith(f"{ROOT}: evaluate --benchmark all --output runs/eval-sample --data {data} --model ")
    assert evaluated.endswith(" --check eval/expected/sample.json --output runs/eval-sample --limit 8")
    assert reported.endswith(" --output runs/eval-sample/report")
