"""The two tables of ARCHITECTURE.md, a sample's way to its loss and a question's way to its answer, against a trace."""

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import avg_llava
from avg_llava import Budget, Pipeline
from avg_llava.common.settings import build
from avg_llava.training.assembly import build_collator, build_dataset, build_model
from avg_llava.training.config import TrainConfig
from avg_llava.training.objectives import MultiGranularityObjective
from tests.tiny import make_checkpoint, stage_values, write_backbones, write_data

PACKAGE = Path(avg_llava.__file__).parent
SECTIONS = re.split(r"^## ", (PACKAGE.parent / "ARCHITECTURE.md").read_text("utf-8"), flags=re.MULTILINE)
MAX_FILES = {"A training sample": 14, "A question": 10}


def section(title: str) -> str:
    (text,) = [text for text in SECTIONS if text.startswith(title)]
    return text


def table(title: str) -> dict[str, list[str]]:
    """File -> functions, in the order of the table."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.*?) \|", section(title), flags=re.MULTILINE)
    return {file: re.findall(r"`([\w.]+)`", functions) for file, functions in rows}


def side_files(title: str) -> set[str]:
    """Files that the section names below its table."""
    below = section(title).rpartition("|\n")[2]
    return set(re.findall(r"`([\w/]+\.py)`", below.partition("`tests/")[0]))


def trace(function: Callable[[], Any]) -> list[tuple[str, str]]:
    """(file, qualified name) of the package's functions that a call enters, in the order of their first call."""
    called: dict[tuple[str, str], None] = {}

    def record(frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            called[path.relative_to(PACKAGE).as_posix(), frame.f_code.co_qualname] = None

    sys.setprofile(record)
    try:
        function()
    finally:
        sys.setprofile(None)
    return list(called)


@pytest.fixture
def training_step(tmp_path) -> Callable[[], Any]:
    """Reads two samples and computes stage 3's loss of them."""
    write_backbones(tmp_path)
    write_data(tmp_path)
    values = stage_values(1, tmp_path, tmp_path)
    values["data"] = copy.deepcopy(stage_values(2, tmp_path, tmp_path)["data"])
    config = build(TrainConfig, values)
    model, processor = build_model(config)
    dataset = build_dataset(config, processor, model.config)
    collator = build_collator(config, processor, dataset)
    objective = MultiGranularityObjective(model, config.objective)

    def step() -> None:
        batch = collator([dataset[0], dataset[1]])
        del batch["index"]
        objective(**batch)["loss"].backward()

    return step


@pytest.fixture
def question(tmp_path) -> Callable[[], Any]:
    pipeline = Pipeline.load(make_checkpoint(tmp_path))
    return lambda: pipeline.ask(Image.effect_noise((70, 40), 80), "how many dots?", max_new_tokens=2)


@pytest.mark.parametrize(("title", "walk"), [("A training sample", "training_step"), ("A question", "question")])
def test_table_is_the_trace(title, walk, request):
    called = trace(request.getfixturevalue(walk))
    listed = table(title)
    assert len(listed) <= MAX_FILES[title]
    assert {file for file, _ in called} == listed.keys() | side_files(title)
    for file, functions in listed.items():
        names = [name for of_file, name in called if of_file == file]
        for function in functions:
            assert any(name == function or name.endswith(f".{function}") for name in names), f"{file}: {function}"


def test_trace_records_the_first_call_of_each_function():
    assert trace(lambda: [Budget(), Budget()]) == [("inference/budget.py", "Budget.__post_init__")]
