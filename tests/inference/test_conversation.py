"""Conversations with a cache, compared with the same conversation computed from scratch at every turn."""

import pytest
import torch
from transformers import AutoTokenizer, TextIteratorStreamer

from avg_llava.checkpoints.loading import build_from_backbones
from avg_llava.inference.answers import Decoding, Request
from avg_llava.inference.budget import Budget, BudgetError
from avg_llava.inference.conversation import Conversation
from avg_llava.inference.pipeline import Pipeline
from avg_llava.model.images import DataError
from avg_llava.model.modeling import PromptTooLongError
from avg_llava.model.processing import AvgLlavaProcessor
from tests.family_tokenizers import make_tokenizer
from tests.tiny import bpe_tokenizer, language_models, make_checkpoint, noise_images, write_backbones


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return Pipeline.load(make_checkpoint(tmp_path_factory.mktemp("tiny"))).predictor


@pytest.fixture(scope="module")
def images():
    return noise_images()


def reference(predictor, conversation, images, decoding):
    """The answer to the last question without a cache, at the conversation's levels."""
    encoded = predictor.encode([Request(conversation.messages[:-1], tuple(images))])
    return predictor.answer(encoded, conversation.levels, decoding)[0]


@pytest.mark.parametrize("budget", [Budget(), Budget(8), Budget(token_cost=0.5), Budget(max_visual_tokens=60)], ids=str)
def test_turns_equal_generation_without_a_cache(predictor, images, budget):
    decoding = Decoding(6)
    conversation = Conversation(predictor, budget, decoding)
    turns = [
        ("what color is it?", [images[0]]),
        ("why?", []),
        ("compare them", [images[1], images[2]]),
        ("and now?", []),
    ]
    shown = []
    for question, new in turns:
        shown += new
        answer = conversation.ask(question, new)
        expected = reference(predictor, conversation, shown, decoding)
        assert answer.text == expected.text
        assert answer.num_prompt_tokens == expected.num_prompt_tokens
        assert answer.num_visual_tokens == expected.num_visual_tokens
        assert len(answer.granularity) == len(new)
        if shown != new:
            assert conversation.num_cached > expected.num_visual_tokens * (not new), "images are read once"
        if budget.max_visual_tokens:
            assert answer.num_visual_tokens <= budget.max_visual_tokens
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 4


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_cache_longer_than_the_window_of_attention(tmp_path, images, name):
    """Sliding windows of 6 tokens: the cache is cropped to a prefix that lies before the window."""
    tokenizer = bpe_tokenizer()
    write_backbones(tmp_path, language=language_models(tokenizer)[name], tokenizer=tokenizer)
    model = build_from_backbones(tmp_path / "vision", tmp_path / "language", template="vicuna_v1")
    processor = AvgLlavaProcessor.from_backbones(tmp_path / "vision", tmp_path / "language", model.config)
    predictor = Pipeline(model, processor).predictor
    conversation = Conversation(predictor, Budget(16), Decoding(6))
    for question, shown in [("what color is it?", [images[0]]), ("why?", []), ("and now?", [])]:
        answer = conversation.ask(question, shown)
        assert answer.text == reference(predictor, conversation, [images[0]], Decoding(6)).text
    assert conversation.num_cached > 6


def test_the_first_turn_is_a_question_like_any_other(predictor, images):
    conversation = Conversation(predictor, decoding=Decoding(6))
    answer = conversation.ask("how many dots?", images[0])
    expected = Pipeline(predictor.model, predictor.processor).ask(images[0], "how many dots?", max_new_tokens=6)
    assert (answer.text, answer.granularity) == (expected.text, expected.granularity)
    torch.testing.assert_close(torch.tensor(answer.router_probs), torch.tensor(expected.router_probs))


def test_answers_are_streamed(predictor, images):
    conversation = Conversation(predictor, decoding=Decoding(6))
    conversation.ask("what?", images[0])
    streamer = TextIteratorStreamer(predictor.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = conversation.ask("why?", streamer=streamer)
    assert "".join(streamer).strip() == answer.text


def test_an_error_leaves_the_conversation_as_it_was(predictor, images):
    decoding = Decoding(6)
    conversation = Conversation(predictor, Budget(max_visual_tokens=30), decoding)
    conversation.ask("what?", images[0])
    before = list(conversation.messages)
    with pytest.raises(DataError, match="image 1: cannot be read"):
        conversation.ask("and this?", b"no image")
    with pytest.raises(BudgetError, match=r"too low|used up"):
        conversation.ask("and these?", images * 10)
    with pytest.raises(PromptTooLongError):
        conversation.ask("word " * 5000)
    assert conversation.messages == before
    answer = conversation.ask("why?")
    assert answer.text == reference(predictor, conversation, images[:1], decoding).text


@pytest.mark.parametrize(
    "template", ["llama_3", "mistral", "mistral_instruct", "chatml", "chatml_direct", "gemma", "phi_3"]
)
def test_every_template_keeps_the_cache(tmp_path, images, template):
    """A turn's prompt begins with the one before and its answer, up to where the answer was cut off."""
    folder = make_checkpoint(tmp_path, tokenizer=make_tokenizer(template), template=template)
    predictor = Pipeline.load(folder).predictor
    conversation = Conversation(predictor, Budget(4), Decoding(5))
    shown, before = images[:2], 0
    for question, new in [("What is it?", [shown[0]]), ("And this?", [shown[1]]), ("Sure?", [])]:
        answer = conversation.ask(question, new)
        assert answer.text == reference(predictor, conversation, shown[: len(conversation.levels)], Decoding(5)).text
        assert conversation.num_cached >= before - 2  # white space at the end of a prompt may join with the answer
        before = answer.num_prompt_tokens


def test_a_placeholder_in_an_answer_is_no_image(tmp_path, images):
    predictor = Pipeline.load(make_checkpoint(tmp_path, tokenizer=bpe_tokenizer())).predictor
    tokenizer = predictor.processor.tokenizer
    written = iter(tokenizer("a <image>", add_special_tokens=False).input_ids)

    def write(module, inputs, output):
        return torch.zeros_like(output).index_fill_(-1, torch.tensor(next(written, tokenizer.eos_token_id)), 9.0)

    hook = predictor.model.lm_head.register_forward_hook(write)
    conversation = Conversation(predictor, decoding=Decoding(20))
    assert conversation.ask("what?", images[0]).text == "a <image>"
    hook.remove()
    answer = conversation.ask("why?")
    assert conversation.messages[1]["content"] == "a < image>"
    assert answer.text == reference(predictor, conversation, images[:1], Decoding(20)).text


def test_tokens_beyond_the_embedding_are_refused(tmp_path):
    folder = make_checkpoint(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["flint", "quartz"])  # the first has the id of images
    tokenizer.save_pretrained(folder)
    pipeline = Pipeline.load(folder)
    with pytest.raises(ValueError, match=r"'quartz', a token of id \d+, but the model embeds \d+ tokens"):
        pipeline.ask(None, "Is it quartz?")
    conversation = Conversation(pipeline.predictor)
    with pytest.raises(ValueError, match="'quartz', a token of id"):
        conversation.ask("Is it quartz?")
    assert conversation.messages == []
