"""The notebook runs from beginning to end, offline, with the model that comes along."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "playground" / "quickstart.ipynb"
NUM_PICTURES = 5  # the drawn one, the router, two questions at all levels, the budget curve


def outputs(notebook, kind):
    return [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == kind]


def pictures(notebook):
    return [output for output in outputs(notebook, "display_data") if "image/png" in output.data]


def test_it_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place, coalesce_streams=True).execute()
    assert len(pictures(notebook)) == NUM_PICTURES
    text = "".join(output.text for output in outputs(notebook, "stream") if output.name == "stdout")
    assert "levels, in visual tokens per crop: [4, 8, 16, 32, 64]" in text
    assert "61 questions about 24 pictures" in text
    assert "answer:        blue" in text, "what is inside the red frame, which the trained model sees at every level"


@pytest.mark.parametrize("kind", ["error", "stderr"])
def test_what_is_shown_was_run_without_complaint(kind):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    found = outputs(notebook, "error") if kind == "error" else outputs(notebook, "stream")
    assert [output for output in found if kind == "error" or output.name == kind] == []
    assert len(pictures(notebook)) == NUM_PICTURES


def test_it_is_small_and_names_no_machine():
    content = NOTEBOOK.read_text("utf-8")
    assert len(content) < 300_000
    assert "site-packages" not in content
    assert "/home/" not in content
    counts = [cell.execution_count for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run in one go, from the top"
    assert json.loads(content)["metadata"]["kernelspec"]["name"] == "python3"
