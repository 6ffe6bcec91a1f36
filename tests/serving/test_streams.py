"""Answers read while they are written."""

import itertools

import pytest

from avg_llava.inference.answers import Answer, Decoding, Request
from avg_llava.inference.pipeline import Pipeline
from avg_llava.serving.streams import stream_answer
from tests.tiny import make_checkpoint, noise_images


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return Pipeline.load(make_checkpoint(tmp_path_factory.mktemp("tiny"))).predictor


@pytest.fixture
def encoded(predictor):
    return predictor.encode([Request("how many dots?", (noise_images()[0],))])


def test_text_grows_to_the_answer(predictor, encoded):
    choice = predictor.choose(encoded)
    *texts, answer = stream_answer(predictor, encoded, choice, Decoding(12))
    (expected,) = predictor.answer(encoded, choice, Decoding(12))
    assert isinstance(answer, Answer)
    assert (answer.text, answer.granularity, answer.router_probs) == (
        expected.text, expected.granularity, expected.router_probs,
    )  # fmt: skip
    assert texts[-1].strip() == answer.text
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert len(texts) > 1


def test_errors_of_the_thread_reach_the_reader(predictor, encoded):
    with pytest.raises(ValueError, match="a level is needed for each image"):
        list(stream_answer(predictor, encoded, None, Decoding(2)))


def test_a_closed_stream_stops_the_writing(predictor, encoded):
    steps = []
    handle = predictor.model.get_input_embeddings().register_forward_hook(lambda *_: steps.append(1))
    try:
        stream = stream_answer(predictor, encoded, predictor.choose(encoded), Decoding(400))
        next(stream)
        stream.close()
    finally:
        handle.remove()
    assert 0 < len(steps) < 400
