"""Batched and routed generation: batching changes nothing, and routing equals forcing the chosen levels."""

import numpy as np
import pytest
import torch
from transformers import TextIteratorStreamer

from avg_llava.inference.answers import Decoding, PhaseTimes, Request
from avg_llava.inference.budget import Budget, BudgetError
from avg_llava.inference.pipeline import Pipeline
from avg_llava.model.images import DataError
from tests.tiny import make_checkpoint, noise_images


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return Pipeline.load(make_checkpoint(tmp_path_factory.mktemp("tiny"))).predictor


@pytest.fixture(scope="module")
def requests():
    images = noise_images()
    questions = ["what color is the background?", "how many dots?", "which code is there in the strip?"]
    single = [Request(questions[index % 3], (image,)) for index, image in enumerate(images)]
    return [*single, Request("no image here"), Request("compare them", (images[0], images[1]))]


@pytest.mark.parametrize("granularity", [None, 1, 8, 16])
def test_batch_equals_single(predictor, requests, granularity):
    batch = predictor.predict(requests, Budget(granularity), decoding=Decoding(8))
    for request, batched in zip(requests, batch, strict=True):
        (single,) = predictor.predict([request], Budget(granularity), decoding=Decoding(8))
        assert batched.text == single.text
        assert batched.granularity == single.granularity
        assert batched.num_visual_tokens == single.num_visual_tokens
        if single.router_probs:
            torch.testing.assert_close(
                torch.tensor(batched.router_probs), torch.tensor(single.router_probs), atol=1e-5, rtol=0
            )


def test_routed_answer_is_the_forced_one_at_the_chosen_level(predictor, requests):
    routed = predictor.predict(requests[:5], decoding=Decoding(8))
    for request, prediction in zip(requests, routed, strict=False):
        (level,) = prediction.granularity
        (probabilities,) = prediction.router_probs
        assert level == predictor.granularities[int(np.argmax(probabilities))]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        (forced,) = predictor.predict([request], Budget(level), decoding=Decoding(8))
        assert (forced.text, forced.num_visual_tokens) == (prediction.text, prediction.num_visual_tokens)
        assert forced.router_probs is None
        assert forced.timings.route == 0


def test_levels_give_different_answers_and_tokens(predictor, requests):
    answers = [
        predictor.predict(requests[:1], Budget(level), decoding=Decoding(8))[0] for level in predictor.granularities
    ]
    tokens = [answer.num_visual_tokens for answer in answers]
    assert tokens == sorted(set(tokens))  # each level costs more than the one before
    assert len({answer.text for answer in answers}) > 1  # else the comparisons above prove nothing


def test_a_high_price_takes_the_coarsest_level(predictor, requests):
    routed = predictor.predict(requests, Budget(token_cost=1e3), decoding=Decoding(1))
    assert [level for prediction in routed for level in prediction.granularity] == [1] * 7


def test_text_only_requests_need_no_level(predictor, requests):
    (prediction,) = predictor.predict([requests[5]], decoding=Decoding(4))
    assert prediction.granularity == ()
    assert prediction.num_visual_tokens == 0
    assert prediction.router_probs is None


def test_encoding_once_serves_every_level(predictor, requests):
    encoded = predictor.encode(requests)
    for level in predictor.granularities:
        once = predictor.answer(encoded, level, decoding=Decoding(6))
        separate = predictor.predict(requests, Budget(level), decoding=Decoding(6))
        assert [prediction.text for prediction in once] == [prediction.text for prediction in separate]


def test_phases_are_timed(predictor, requests):
    timings = predictor.predict(requests, decoding=Decoding(4))[0].timings
    assert isinstance(timings, PhaseTimes)
    assert min(timings.encode, timings.route, timings.prefill, timings.decode) > 0


def test_images_are_read_from_files(predictor, requests, tmp_path):
    path = tmp_path / "image.png"
    requests[0].images[0].save(path)
    from_file = predictor.predict([Request(requests[0].prompt, (path,))], Budget(16), decoding=Decoding(8))[0]
    assert from_file.text == predictor.predict(requests[:1], Budget(16), decoding=Decoding(8))[0].text


def test_mistakes_are_reported(predictor, requests, tmp_path):
    with pytest.raises(ValueError, match="granularity 7 is not one of this model's levels: 1, 2, 4, 8, 16"):
        predictor.predict(requests[:1], Budget(7))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.png: cannot be read as an image"):
        predictor.predict([Request("what?", (broken,))])
    with pytest.raises(DataError, match=r"absent\.png: image file not found"):
        predictor.predict([Request("what?", (tmp_path / "absent.png",))])
    with pytest.raises(ValueError, match="none of these requests has one"):
        predictor.choose(predictor.encode(requests[5:6]))


def test_requests_are_answered_as_transformers_generate_answers_them(predictor, requests):
    """The reference: one prompt at a time through the model's `generate`, which routes."""
    answers = predictor.predict(requests, decoding=Decoding(8))
    assert len({answer.granularity for answer in answers}) > 2, "else nothing is grouped"
    for request, answer in zip(requests, answers, strict=True):
        inputs = predictor.inputs([request])
        (ids,) = predictor.model.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0).tolist()
        assert answer.num_new_tokens == len(ids)
        assert answer.text == predictor.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        placeholders = int((inputs["input_ids"] == predictor.model.config.image_token_id).sum())
        assert answer.num_prompt_tokens == inputs["input_ids"].numel() - placeholders + answer.num_visual_tokens
        assert answer.finish_reason == (
            "stop" if ids[-1] == predictor.model.generation_config.eos_token_id else "length"
        )


def test_each_request_has_a_budget_of_its_own(predictor, requests):
    budgets = [
        Budget(1),
        Budget(),
        Budget(token_cost=1e3),
        Budget(max_visual_tokens=20),
        Budget(16),
        Budget(),
        Budget(2),
    ]
    batch = predictor.predict(requests, budgets, Decoding(6))
    for request, budget, answer in zip(requests, budgets, batch, strict=True):
        (single,) = predictor.predict([request], budget, Decoding(6))
        assert (answer.text, answer.granularity) == (single.text, single.granularity)
    assert batch[0].granularity == batch[2].granularity == (1,)
    assert batch[3].num_visual_tokens <= 20
    assert batch[6].granularity == (2, 2)


def test_a_limit_holds_for_all_images_of_a_request(predictor, requests):
    two = requests[6]
    full = predictor.predict([two], Budget(16), Decoding(1))[0].num_visual_tokens
    for limit in (full, full // 2, full // 4):
        assert predictor.predict([two], Budget(max_visual_tokens=limit), Decoding(1))[0].num_visual_tokens <= limit
    with pytest.raises(BudgetError, match="max_visual_tokens 2 is too low: at the coarsest level the images take"):
        predictor.predict([two], Budget(max_visual_tokens=2), Decoding(1))
    with pytest.raises(BudgetError, match="too low"):
        predictor.predict([two], Budget(16, max_visual_tokens=full - 1), Decoding(1))


def test_streamed_text_is_the_answer(predictor, requests):
    streamer = TextIteratorStreamer(predictor.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = predictor.predict(requests[:1], decoding=Decoding(8), streamer=streamer)[0]
    assert "".join(streamer).strip() == answer.text
    with pytest.raises(ValueError, match="2 requests come with 2 decodings and 1 streamers"):
        predictor.predict(requests[:2], streamer=streamer)
    with pytest.raises(ValueError, match="2 requests come with 3 decodings and 2 streamers"):
        predictor.predict(requests[:2], decoding=[Decoding()] * 3)


def test_stop_texts_end_an_answer(predictor, requests):
    whole = predictor.predict(requests[:1], decoding=Decoding(8))[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    cut = predictor.predict(requests[:1], decoding=Decoding(8, stop=(stop,)))[0]
    assert cut.text == whole.text.split(stop)[0].strip()
    assert cut.finish_reason == "stop"
    assert cut.num_new_tokens <= whole.num_new_tokens


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}, {"stop": ("",)}],
    ids=str,
)
def test_wrong_decoding(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Decoding(**wrong)


@pytest.mark.gpu
def test_gpu_gives_the_answers_of_the_cpu(predictor, requests, tmp_path):
    on_gpu = Pipeline.load(make_checkpoint(tmp_path), device="cuda").generate_batch(requests, decoding=Decoding(8))
    on_cpu = predictor.predict(requests, decoding=Decoding(8))
    for first, second in zip(on_gpu, on_cpu, strict=True):
        assert (first.text, first.granularity) == (second.text, second.granularity)
        # Float32 on a GPU may use TF32 and sums in another order.
        assert np.allclose(first.router_probs or (), second.router_probs or (), atol=1e-3)
