"""The generated predictions that parity is shown on are varied: lmms-eval itself calls some right and some wrong."""

import random

import pytest

from tests.evaluation.harness import TASKS, drawn_benchmarks, load_task, score
from tests.evaluation.predictions import odd_predictions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with drawn_benchmarks(tmp_path_factory.mktemp("benchmarks")) as folder:
        yield folder


@pytest.mark.parametrize("benchmark", TASKS)
def test_predictions_are_varied(benchmark, folder):
    task = load_task(benchmark, folder)
    docs = [dict(doc) for doc in task.dataset_no_image[task.config.test_split]]
    predictions = odd_predictions(benchmark, docs)
    assert predictions == odd_predictions(benchmark, docs)
    assert predictions != odd_predictions(benchmark, docs, seed=1)
    assert len(predictions) == 500
    assert {index for index, _ in predictions} == set(range(len(docs)))
    texts = {text for _, text in predictions}
    assert len(texts) > 80
    assert any(not text for text in texts)
    assert any(text and not text.strip() for text in texts)
    assert any(len(text) > 1000 for text in texts)
    assert any(not text.isascii() for text in texts)

    random.seed(0)  # MMMU guesses where it finds no letter
    scores = [score(benchmark, task, docs[index], text) for index, text in predictions]
    assert sum(value > 0.99 for value in scores) >= 75, "hits"
    assert sum(value < 0.01 for value in scores) >= 75, "misses"
    if benchmark in ("vizwiz", "textvqa", "docvqa"):
        assert sum(0.01 < value < 0.99 for value in scores) >= 15, "scores in between"
