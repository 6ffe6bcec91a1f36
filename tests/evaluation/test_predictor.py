"""Batched, routed generation: batches change nothing, and a routed answer is the forced one at the chosen level."""

import numpy as np
import pytest
import torch
from PIL import Image

from avg_llava.data.records import DataError
from avg_llava.evaluation.predictor import PhaseTimes, Predictor, Request
from avg_llava.model.loading import load
from tests.tiny import make_checkpoint

SIZES = [(40, 40), (90, 30), (33, 70), (64, 64), (20, 25)]  # (width, height)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    model, processor = load(make_checkpoint(tmp_path_factory.mktemp("tiny")))
    return Predictor(model, processor)


@pytest.fixture(scope="module")
def requests():
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]
    questions = ["what color is the background?", "how many dots?", "which code is there in the strip?"]
    single = [Request(questions[index % 3], (image,)) for index, image in enumerate(images)]
    return [*single, Request("no image here"), Request("compare them", (images[0], images[1]))]


@pytest.mark.parametrize("granularity", [None, 1, 8, 16])
def test_batch_equals_single(predictor, requests, granularity):
    batch = predictor.predict(requests, granularity, max_new_tokens=8)
    for request, batched in zip(requests, batch, strict=True):
        (single,) = predictor.predict([request], granularity, max_new_tokens=8)
        assert batched.text == single.text
        assert batched.granularity == single.granularity
        assert batched.num_visual_tokens == single.num_visual_tokens
        if single.router_probs:
            torch.testing.assert_close(
                torch.tensor(batched.router_probs), torch.tensor(single.router_probs), atol=1e-5, rtol=0
            )


def test_routed_answer_is_the_forced_one_at_the_chosen_level(predictor, requests):
    routed = predictor.predict(requests[:5], max_new_tokens=8)
    for request, prediction in zip(requests, routed, strict=False):
        (level,) = prediction.granularity
        (probabilities,) = prediction.router_probs
        assert level == predictor.granularities[int(np.argmax(probabilities))]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        (forced,) = predictor.predict([request], level, max_new_tokens=8)
        assert (forced.text, forced.num_visual_tokens) == (prediction.text, prediction.num_visual_tokens)
        assert forced.router_probs is None
        assert forced.timings.route == 0


def test_levels_give_different_answers_and_tokens(predictor, requests):
    answers = [predictor.predict(requests[:1], level, max_new_tokens=8)[0] for level in predictor.granularities]
    tokens = [answer.num_visual_tokens for answer in answers]
    assert tokens == sorted(set(tokens))  # each level costs more than the one before
    assert len({answer.text for answer in answers}) > 1  # else the comparisons above prove nothing


def test_a_high_price_takes_the_coarsest_level(predictor, requests):
    routed = predictor.predict(requests, token_cost=1e3, max_new_tokens=1)
    assert [level for prediction in routed for level in prediction.granularity] == [1] * 7


def test_text_only_requests_need_no_level(predictor, requests):
    (prediction,) = predictor.predict([requests[5]], max_new_tokens=4)
    assert prediction.granularity == ()
    assert prediction.num_visual_tokens == 0
    assert prediction.router_probs is None


def test_encoding_once_serves_every_level(predictor, requests):
    encoded = predictor.encode(requests)
    for level in predictor.granularities:
        once = predictor.answer(encoded, level, max_new_tokens=6)
        anew = predictor.predict(requests, level, max_new_tokens=6)
        assert [prediction.text for prediction in once] == [prediction.text for prediction in anew]


def test_phases_are_timed(predictor, requests):
    timings = predictor.predict(requests, max_new_tokens=4)[0].timings
    assert isinstance(timings, PhaseTimes)
    assert min(timings.encode, timings.route, timings.prefill, timings.decode) > 0


def test_images_are_read_from_files(predictor, requests, tmp_path):
    path = tmp_path / "image.png"
    requests[0].images[0].save(path)
    from_file = predictor.predict([Request(requests[0].prompt, (path,))], 16, max_new_tokens=8)[0]
    assert from_file.text == predictor.predict(requests[:1], 16, max_new_tokens=8)[0].text


def test_mistakes_are_told(predictor, requests, tmp_path):
    with pytest.raises(ValueError, match="granularity 7 is not one of this model's levels: 1, 2, 4, 8, 16"):
        predictor.predict(requests[:1], 7)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.png: cannot be read as an image"):
        predictor.predict([Request("what?", (broken,))])
    with pytest.raises(DataError, match=r"absent\.png: image file not found"):
        predictor.predict([Request("what?", (tmp_path / "absent.png",))])
    with pytest.raises(ValueError, match="none of these requests has one"):
        predictor.choose(predictor.encode(requests[5:6]))


@pytest.mark.gpu
def test_gpu_gives_the_answers_of_the_cpu(predictor, requests, tmp_path):
    model, processor = load(make_checkpoint(tmp_path))
    on_gpu = Predictor(model.to("cuda"), processor).predict(requests, max_new_tokens=8)
    on_cpu = predictor.predict(requests, max_new_tokens=8)
    for first, second in zip(on_gpu, on_cpu, strict=True):
        assert (first.text, first.granularity) == (second.text, second.granularity)
        # Float32 on a GPU may use TF32 and sums in another order.
        assert np.allclose(first.router_probs or (), second.router_probs or (), atol=1e-3)
