"""Times of the first token: medians of what the answers say, in the order of the budgets."""

from types import SimpleNamespace

import pytest

from avg_llava.inference.answers import Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.pipeline import Pipeline
from avg_llava.serving import timing
from tests.tiny import make_checkpoint, noise_images


def watched(monkeypatch, predictor):
    """Lets the model answer, and notes each budget and time."""
    noted, predict = [], predictor.predict

    def noting(requests, budget, decoding):
        answers = predict(requests, budget, decoding)
        noted.append((budget, decoding, answers[0].timings.first_token))
        return answers

    monkeypatch.setattr(predictor, "predict", noting)
    return noted


def test_medians_of_alternating_answers(monkeypatch, tmp_path):
    predictor = Pipeline.load(make_checkpoint(tmp_path)).predictor
    noted = watched(monkeypatch, predictor)
    budgets = [Budget(), Budget(16)]
    request = Request("how many dots?", (noise_images()[0],))
    monkeypatch.setattr(timing, "SECONDS", 1e9)
    times = timing.time_first_tokens(predictor, request, budgets)
    assert [budget for budget, _, _ in noted] == budgets * 5
    assert {decoding for _, decoding, _ in noted} == {Decoding(1)}
    for budget, median in zip(budgets, times, strict=True):
        assert median == sorted(time for own, _, time in noted if own == budget)[2]

    noted.clear()
    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=iter([0.0, 1.0, 1e9 + 1]).__next__))
    times = timing.time_first_tokens(predictor, request, budgets)  # which take long: two rounds
    assert len(noted) == 4
    assert times[1] == pytest.approx((noted[1][2] + noted[3][2]) / 2)
