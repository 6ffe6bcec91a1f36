"""Benchmarks that are no task of lmms-eval: the worked example, and questions read from files."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from pyarrow import Table, parquet

from avg_llava.cli import main
from avg_llava.evaluation.answering import Setting, open_questions
from avg_llava.evaluation.benchmarks import BENCHMARKS, Benchmark, LocalTask
from avg_llava.evaluation.evaluate import evaluate
from avg_llava.evaluation.questions import BenchmarkError, read_rows
from tests.reports.fixture_results import read_result

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "extending" / "benchmark.py"


@pytest.fixture
def example(monkeypatch):
    """The example's module, whose benchmark is in the table during the test."""
    monkeypatch.setitem(BENCHMARKS, "colours", None)  # removed again after the test
    specification = importlib.util.spec_from_file_location("colours", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _setting(checkpoint, data=None):
    return Setting("colours", checkpoint, "current", "all", 0.0, data, None, 1, torch.float32)


def test_the_example_is_evaluated_and_reported(example, checkpoint, tmp_path, capsys):
    result = evaluate(_setting(checkpoint), tmp_path, num_workers=1, num_timed=1)
    assert read_result(tmp_path / "colours.json") == result
    assert result.complete
    assert result.harness.name == "avg-llava"
    lines = [json.loads(line) for line in (tmp_path / "colours.answers.jsonl").read_text().splitlines()]
    assert [line["reference"] for line in lines] == ["red", "green", "blue"]
    scores = [example.score(doc, line["prediction"]) for doc, line in zip(example.QUESTIONS, lines, strict=True)]
    assert list(result.headline.units.values()) == [score["exact_match"] for score in scores]
    assert result.routing.oracle.value >= result.headline.value
    assert main(["report", str(tmp_path / "colours.json"), "--output", str(tmp_path / "report")]) == 0
    tables = capsys.readouterr().out
    assert "| model | level chosen by | protocol | Colours |" in tables
    assert "| Colours |" in tables


def test_a_command_of_a_script_knows_the_example_in_all_its_processes(checkpoint, tmp_path):
    """The script of docs/extending.md."""
    (script,) = re.findall(r"```python\n(.*?)```", (EXAMPLE.parents[2] / "extending.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "own.py").write_text(script)
    shutil.copy(EXAMPLE, tmp_path)
    options = ["--benchmark", "colours", "--model", checkpoint, "--output", tmp_path / "results", "--timed", "0"]
    subprocess.run([sys.executable, "own.py", "evaluate", *options, "--workers", "2"], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "results" / "colours.json").read_text())["complete"]


def test_a_right_answer_scores_one(example):
    assert example.score({"answer": "red"}, " Red.") == {"exact_match": 1.0}
    assert example.score({"answer": "red"}, "blue") == {"exact_match": 0.0}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_questions_from_a_file(monkeypatch, checkpoint, tmp_path, suffix):
    """A broken image costs its question only."""
    rows = [{"image": "a.png", "answer": "red"}, {"image": "cut.png", "answer": "blue"}]
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    file = tmp_path / f"questions{suffix}"
    if suffix == ".parquet":
        parquet.write_table(Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows))
    task = LocalTask(
        read=lambda data: read_rows(data / file.name),
        prompt=lambda doc: "What colour is it?",
        images=lambda doc: [tmp_path / doc["image"]],
        reference=lambda doc: doc["answer"],
        score=lambda doc, answer: {"exact_match": float(answer == doc["answer"])},
    )
    monkeypatch.setitem(BENCHMARKS, "colours", Benchmark("Colours", 2, task))
    result = evaluate(_setting(checkpoint, tmp_path), tmp_path / "out", num_workers=1, num_timed=0)
    assert [failure.id for failure in result.failures] == ["1"]
    assert result.failures[0].error.startswith("colours question 1: ")
    assert "cannot be read as an image" in result.failures[0].error


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_lines_end_at_newlines_only(tmp_path, separator):
    rows = [{"question": f"one{separator}two"}, {"question": "three"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert read_rows(tmp_path / "a.jsonl") == rows


def test_mistakes_are_named(monkeypatch, checkpoint, tmp_path):
    with pytest.raises(BenchmarkError, match="does not exist; --data names the folder"):
        read_rows(tmp_path / "gone.json")
    (tmp_path / "a.csv").touch()
    with pytest.raises(BenchmarkError, match=r"from \.json, \.jsonl and \.parquet files"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(BenchmarkError, match="must hold a list of objects"):
        read_rows(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[")
    with pytest.raises(BenchmarkError, match="is not valid JSON"):
        read_rows(tmp_path / "b.json")
    task = LocalTask(lambda data: [], str, list, str, lambda doc, answer: {})
    monkeypatch.setitem(BENCHMARKS, "colours", Benchmark("Colours", 1, task))
    with pytest.raises(BenchmarkError, match="has no questions"):
        open_questions(_setting(checkpoint))


def test_names_of_benchmarks_are_cheap():
    code = (
        "import sys; from avg_llava.evaluation.benchmarks import BENCHMARKS; assert len(BENCHMARKS) == 12; "
        "print([name for name in ('torch', 'lmms_eval', 'datasets', 'pandas', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
