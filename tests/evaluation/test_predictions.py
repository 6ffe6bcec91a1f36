"""The predictions of the parity tests are varied: lmms-eval scores many as right and many as wrong."""

import random

import pytest

from tests.evaluation.harness import TASKS, load_task, score
from tests.evaluation.predictions import make_predictions


@pytest.mark.parametrize("benchmark", TASKS)
def test_predictions_are_varied(benchmark, data):
    task = load_task(benchmark, data)
    docs = [dict(doc) for doc in task.dataset_no_image[task.config.test_split]]
    predictions = make_predictions(benchmark, docs)
    assert predictions == make_predictions(benchmark, docs)
    assert predictions != make_predictions(benchmark, docs, seed=1)
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
