"""Pieces of text are the answer's text, whatever its tokens and the texts at which it ends."""

import random

import pytest

from avg_llava.inference.answers import cut_at
from avg_llava.mini.tokenizer import build_tokenizer
from avg_llava.serving.deltas import Deltas


class Bytes:
    """A tokenizer whose tokens are bytes, so that characters come in pieces."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return bytes(ids).decode("utf-8", errors="replace")


def pieces_of(tokenizer, ids, stops, step=1):
    """The pieces of an answer that ends where a stop text is complete, and its whole text."""
    deltas, taken, pieces = Deltas(tokenizer, stops), [], []
    for start in range(0, len(ids), step):
        taken += ids[start : start + step]
        pieces.append(deltas.add(ids[start : start + step]))
        if any(stop in tokenizer.decode(taken, skip_special_tokens=True) for stop in stops):
            break
    text = cut_at(tokenizer.decode(taken, skip_special_tokens=True), stops)
    return [*pieces, deltas.rest(text)], text


@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("stops", [(), ("ab",), ("aab", "ba "), ("é",), (" ",)], ids=str)
def test_pieces_are_the_text(stops, step):
    rng = random.Random(step)
    for _ in range(200):
        text = "".join(rng.choice(["a", "b", " ", "é", "漢", "\n"]) for _ in range(rng.randrange(12)))
        pieces, whole = pieces_of(Bytes(), list(text.encode()), stops, step)
        assert "".join(pieces) == whole
        assert "\ufffd" not in "".join(pieces)


def test_text_comes_as_soon_as_it_is_certain():
    pieces, _ = pieces_of(Bytes(), list(b"a b c"), ())
    assert pieces == ["a", "", " b", "", " c", ""]
    pieces, whole = pieces_of(Bytes(), list(b"xENxENDy"), ("END",))
    assert pieces == ["x", "", "", "ENx", "", "", "", ""]
    assert whole == "xENx"


def test_bytes_that_are_no_character_come_at_the_end():
    pieces, whole = pieces_of(Bytes(), [*b"ab", 0xE6], ())
    assert pieces == ["a", "b", "", "\ufffd"]
    assert whole == "ab\ufffd"


def test_the_mini_tokenizer():
    tokenizer = build_tokenizer()
    ids = tokenizer("the letter K is red, star 4 7 1", add_special_tokens=False).input_ids
    pieces, whole = pieces_of(tokenizer, [*ids, tokenizer.eos_token_id], ("never",))
    assert "".join(pieces) == whole == tokenizer.decode(ids)
    assert len([piece for piece in pieces if piece]) > 5
