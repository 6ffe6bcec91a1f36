"""Text of an answer while its tokens come: never a piece that a later token or a stop text could take back."""

from collections.abc import Sequence
from typing import Any

from avg_llava.inference.answers import cut_at

_UNFINISHED = "\ufffd"  # what a character is decoded to while some of its bytes are missing


class Deltas:
    """Turns tokens into pieces of text, which together are the answer's text.

    Args:
        tokenizer: The model's.
        stops: Texts at which the answer ends.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._sent = ""

    def add(self, ids: Sequence[int]) -> str:
        """The text that is certain now and was not before; often none."""
        self._ids += ids
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).rstrip(_UNFINISHED)
        if not any(stop in text for stop in self._stops):
            text = text[: len(text) - self._beginning_of_a_stop(text)]
        return self._new(cut_at(text, self._stops))

    def rest(self, text: str) -> str:
        """What is left of the answer's whole text."""
        return self._new(text)

    def _beginning_of_a_stop(self, text: str) -> int:
        """How many characters at the end of the text may turn out to belong to a stop text."""
        lengths = (length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return max(lengths, default=0)

    def _new(self, text: str) -> str:
        new = text[len(self._sent) :]
        self._sent += new
        return new


__all__ = ["Deltas"]
