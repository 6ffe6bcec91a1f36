"""Answers generated together end, sample and stream one by one, and are the same as alone."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TextIteratorStreamer, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from avg_llava.inference.answers import Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.generation import AnswerAbandoned, GumbelSampler
from avg_llava.inference.pipeline import Pipeline
from tests.tiny import make_checkpoint, noise_images

LEVEL = Budget(4)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return Pipeline.load(make_checkpoint(tmp_path_factory.mktemp("tiny"))).predictor


@pytest.fixture(scope="module")
def requests():
    return [Request("what color is the background?", (image,)) for image in noise_images()]


class Recorder(BaseStreamer):
    """Records tokens, and abandons the answer after a number of them."""

    def __init__(self, max_tokens=1000):
        self.ids, self.max_tokens, self.num_ends = [], max_tokens, 0

    def put(self, value):
        self.ids += value.flatten().tolist()
        if len(self.ids) >= self.max_tokens:
            raise AnswerAbandoned

    def end(self):
        self.num_ends += 1


def transformers_scores(logits, temperature, top_p):
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    return TopPLogitsWarper(top_p)(None, scores)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.5, 0.6)])
def test_samples_have_the_distribution_of_transformers(temperature, top_p):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    expected = transformers_scores(logits[None], temperature, top_p).softmax(-1)[0]
    num_samples = 4000
    sampler = GumbelSampler([Decoding(temperature=temperature, top_p=top_p, seed=seed) for seed in range(num_samples)])
    counts = torch.bincount(sampler(None, logits.repeat(num_samples, 1)).argmax(-1), minlength=12)
    assert counts[expected == 0].sum() == 0
    # Five standard deviations: none of a few dozen counts deviates further.
    deviation = (num_samples * expected * (1 - expected)).sqrt()
    assert ((counts - num_samples * expected).abs() <= 5 * deviation + 1e-6).all()


def test_rows_without_temperature_keep_their_scores():
    logits = torch.randn(3, 9)
    given = logits.clone()
    scores = GumbelSampler([Decoding(), Decoding(temperature=1.0, seed=1), Decoding()])(None, logits)
    assert torch.equal(scores[[0, 2]], given[[0, 2]])
    assert not torch.equal(scores[1], given[1])
    assert torch.equal(logits, given)


def test_the_smallest_temperature_takes_the_most_probable_token():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (5e-324, 1e-30, 1e-4):
        scores = GumbelSampler([Decoding(temperature=temperature, top_p=0.5, seed=0)])(None, logits)
        assert scores.argmax(-1).tolist() == [1]
        assert not scores.isnan().any()


def test_seeded_samples_do_not_depend_on_the_batch(predictor, requests):
    decodings = [Decoding(12, temperature=3.0, top_p=0.95, seed=seed) for seed in range(5)]
    decodings[2] = Decoding(5)
    batch = predictor.predict(requests, LEVEL, decodings)
    for request, decoding, answer in zip(requests, decodings, batch, strict=True):
        (alone,) = predictor.predict([request], LEVEL, decoding)
        assert (answer.text, answer.num_new_tokens) == (alone.text, alone.num_new_tokens)
    same = predictor.predict(requests[:1] * 5, LEVEL, [*decodings[:2], Decoding(12), *decodings[3:]])
    assert len({answer.text for answer in same}) == 5


def test_samples_without_a_seed_follow_torch(predictor, requests):
    def sample(seed):
        torch.manual_seed(seed)
        return predictor.predict(requests[:1], decoding=Decoding(12, temperature=5.0, top_p=0.99))[0].text

    assert sample(0) == sample(0)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_each_answer_ends_by_itself(predictor, requests):
    whole = predictor.predict(requests, LEVEL, Decoding(10))
    stop = whole[3].text[3:6]
    decodings = [Decoding(1), Decoding(10), Decoding(4), Decoding(10, stop=("never said", stop)), Decoding(7)]
    recorders = [Recorder() for _ in requests]
    batch = predictor.predict(requests, LEVEL, decodings, recorders)
    for request, decoding, recorder, answer in zip(requests, decodings, recorders, batch, strict=True):
        (alone,) = predictor.predict([request], LEVEL, decoding)
        assert (answer.text, answer.finish_reason) == (alone.text, alone.finish_reason)
        assert len(recorder.ids) == answer.num_new_tokens <= decoding.max_new_tokens
        assert recorder.num_ends == 1
    assert batch[3].text == whole[3].text.split(stop)[0].strip()
    assert batch[3].finish_reason == "stop"
    assert [answer.num_new_tokens for answer in batch[:3]] == [1, whole[1].num_new_tokens, 4]
    assert whole[1].text.startswith(predictor.processor.tokenizer.decode(recorders[1].ids[:2]).strip())


def test_all_answers_of_a_batch_stream(predictor, requests):
    tokenizer = predictor.processor.tokenizer
    streamers = [TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) for _ in requests]
    budgets = [Budget(1), Budget(16), Budget(1), Budget(4), Budget(16)]  # several levels, so several groups
    answers = predictor.predict(requests, budgets, Decoding(8), streamers)
    for streamer, answer in zip(streamers, answers, strict=True):
        assert "".join(streamer).strip() == answer.text


def test_an_answer_is_reported_as_soon_as_it_has_ended(predictor, requests):
    encoded = predictor.encode(requests)
    steps, reported = [], {}
    handle = predictor.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    lengths = [2, 9, 1, 5, 9]
    try:
        answers = predictor.answer(
            encoded,
            4,
            [Decoding(length) for length in lengths],
            on_answer=lambda row, answer: reported.update({row: (answer, len(steps))}),
        )
    finally:
        handle.remove()
    for row, answer in enumerate(answers):
        assert reported[row] == (answer, answer.num_new_tokens)
    assert [answers[row].num_new_tokens for row in (0, 2)] == [2, 1]
    assert answers[2].timings.decode == 0 < answers[0].timings.decode < max(answer.timings.decode for answer in answers)


def test_an_abandoned_answer_ends_and_no_other(predictor, requests):
    recorders = [Recorder(), Recorder(max_tokens=2), None, Recorder(), Recorder(max_tokens=0)]
    answers = predictor.predict(requests, LEVEL, Decoding(9), recorders)
    alone = predictor.predict(requests, LEVEL, Decoding(9))
    assert [answer.finish_reason for answer in answers] == [
        *(alone[0].finish_reason, "abandoned", alone[2].finish_reason, alone[3].finish_reason, "abandoned"),
    ]
    for kept in (0, 2, 3):
        assert answers[kept].text == alone[kept].text
    assert (len(recorders[1].ids), recorders[1].num_ends) == (2, 0)
    assert (len(recorders[4].ids), answers[4].num_new_tokens) == (0, 0)


def test_nothing_is_generated_after_the_last_answer_is_abandoned(predictor, requests):
    steps = []
    handle = predictor.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    try:
        predictor.predict(requests[:2], LEVEL, Decoding(50), [Recorder(max_tokens=2), Recorder(max_tokens=3)])
    finally:
        handle.remove()
    assert len(steps) == 3
