"""Streamed text equals the text of the answer, whatever its tokens and stop strings."""

import itertools
import random

import pytest

from avg_llava.inference.answers import Answer, Decoding, Request, cut_at
from avg_llava.inference.pipeline import Pipeline
from avg_llava.mini.tokenizer import build_tokenizer
from avg_llava.serving.streams import TextDeltas, stream_answer
from tests.tiny import make_checkpoint, noise_images


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return Pipeline.load(make_checkpoint(tmp_path_factory.mktemp("tiny"))).predictor


@pytest.fixture
def encoded(predictor):
    return predictor.encode([Request("how many dots?", (noise_images()[0],))])


def test_stream_grows_to_the_answer(predictor, encoded):
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


def test_errors_of_the_thread_are_raised_by_the_stream(predictor, encoded):
    with pytest.raises(ValueError, match="a level is needed for each image"):
        list(stream_answer(predictor, encoded, None, Decoding(2)))


def test_closing_the_stream_stops_generation(predictor, encoded):
    steps = []
    handle = predictor.model.get_input_embeddings().register_forward_hook(lambda *_: steps.append(1))
    try:
        stream = stream_answer(predictor, encoded, predictor.choose(encoded), Decoding(400))
        next(stream)
        stream.close()
    finally:
        handle.remove()
    assert 0 < len(steps) < 400


class ByteTokenizer:
    """Tokens are bytes, so that a character can span several tokens."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return bytes(ids).decode("utf-8", errors="replace")


def pieces_of(tokenizer, ids, stops, step=1):
    """Streams tokens until a stop string is complete; returns the pieces and the text of the whole answer."""
    deltas, taken, pieces = TextDeltas(tokenizer, stops), [], []
    for start in range(0, len(ids), step):
        taken += ids[start : start + step]
        pieces.append(deltas.add(ids[start : start + step]))
        if any(stop in tokenizer.decode(taken, skip_special_tokens=True) for stop in stops):
            break
    text = cut_at(tokenizer.decode(taken, skip_special_tokens=True), stops)
    return [*pieces, deltas.rest(text)], text


@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("stops", [(), ("ab",), ("aab", "ba "), ("é",), (" ",)], ids=str)
def test_pieces_concatenate_to_the_text(stops, step):
    rng = random.Random(step)
    for _ in range(200):
        text = "".join(rng.choice(["a", "b", " ", "é", "漢", "\n"]) for _ in range(rng.randrange(12)))
        pieces, whole = pieces_of(ByteTokenizer(), list(text.encode()), stops, step)
        assert "".join(pieces) == whole
        assert "\ufffd" not in "".join(pieces)


def test_text_is_sent_as_soon_as_it_is_final():
    pieces, _ = pieces_of(ByteTokenizer(), list(b"a b c"), ())
    assert pieces == ["a", "", " b", "", " c", ""]
    pieces, whole = pieces_of(ByteTokenizer(), list(b"xENxENDy"), ("END",))
    assert pieces == ["x", "", "", "ENx", "", "", "", ""]
    assert whole == "xENx"


def test_incomplete_characters_are_sent_at_the_end():
    pieces, whole = pieces_of(ByteTokenizer(), [*b"ab", 0xE6], ())
    assert pieces == ["a", "b", "", "\ufffd"]
    assert whole == "ab\ufffd"


def test_mini_tokenizer():
    tokenizer = build_tokenizer()
    ids = tokenizer("the letter K is red, star 4 7 1", add_special_tokens=False).input_ids
    pieces, whole = pieces_of(tokenizer, [*ids, tokenizer.eos_token_id], ("never",))
    assert "".join(pieces) == whole == tokenizer.decode(ids)
    assert len([piece for piece in pieces if piece]) > 5
