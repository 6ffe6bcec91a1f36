"""The pipeline answers as the predictor and the conversation beneath it."""

import pytest

from avg_llava import Budget, Decoding, Pipeline, Request
from avg_llava.inference.conversation import Conversation
from avg_llava.model.images import DataError
from tests.tiny import make_checkpoint, noise_images

QUESTION = "what color is the background?"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return Pipeline.load(make_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def images():
    return noise_images()


def test_load_passes_its_arguments_on(tmp_path):
    pipeline = Pipeline.load(make_checkpoint(tmp_path), behavior="released")
    assert pipeline.model.config.behavior == "released"
    assert pipeline.model is pipeline.predictor.model
    assert pipeline.processor is pipeline.predictor.processor


def test_ask_takes_images_in_any_form(pipeline, images, tmp_path):
    (expected,) = pipeline.predictor.predict([Request(QUESTION, (images[0],))], decoding=Decoding(8))
    path = tmp_path / "image.png"
    images[0].save(path)
    for form in (images[0], [images[0]], path, str(path), path.read_bytes()):
        answer = pipeline.ask(form, QUESTION, max_new_tokens=8)
        assert (answer.text, answer.granularity) == (expected.text, expected.granularity)
    assert pipeline.ask(None, "no image here", max_new_tokens=2).granularity == ()
    both = pipeline.ask(images[:2], "compare them", granularity=4, max_new_tokens=2)
    assert both.granularity == (4, 4)
    with pytest.raises(DataError, match="image 1: cannot be read as an image"):
        pipeline.ask(b"nothing", "what?")


def test_a_batch_has_a_budget_and_decoding_for_each(pipeline, images):
    requests = [Request(QUESTION, (image,)) for image in images[:3]]
    budgets, decodings = [Budget(1), Budget(), Budget(token_cost=5.0)], [Decoding(2), Decoding(4), Decoding(6)]
    answers = pipeline.generate_batch(requests, budgets, decodings)
    for request, budget, decoding, answer in zip(requests, budgets, decodings, answers, strict=True):
        alone = pipeline.ask(
            request.images,
            QUESTION,
            budget.granularity,
            budget.token_cost,
            max_new_tokens=decoding.max_new_tokens,
        )
        assert (answer.text, answer.granularity) == (alone.text, alone.granularity)


def test_chat_starts_a_conversation(pipeline, images):
    conversation = pipeline.chat(Budget(4), Decoding(3))
    assert isinstance(conversation, Conversation)
    assert conversation.ask(QUESTION, images[0]).text == pipeline.ask(images[0], QUESTION, 4, max_new_tokens=3).text
    assert conversation.levels == [4]
