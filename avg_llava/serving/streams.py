"""Streaming of generated text: stable pieces for server-sent events, and an iterator over a running generation."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import TextIteratorStreamer

from avg_llava.inference.answers import Answer, Decoding, cut_at
from avg_llava.inference.generation import AnswerAbandoned
from avg_llava.inference.predictor import EncodedRequests, LevelChoice, Predictor

_INCOMPLETE = "\ufffd"  # decoded in place of a character while some of its bytes are missing


class TextDeltas:
    """Incremental detokenizer: the pieces it returns concatenate to the text of the answer.

    Text is held back while later tokens could change it: incomplete characters, and prefixes of stop strings.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._sent = ""

    def add(self, ids: Sequence[int]) -> str:
        """Appends tokens and returns the text that became final, often an empty string."""
        self._ids += ids
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).rstrip(_INCOMPLETE)
        if not any(stop in text for stop in self._stops):
            prefixes = (stop[:length] for stop in self._stops for length in range(1, len(stop)))
            text = text.removesuffix(max(filter(text.endswith, prefixes), key=len, default=""))
        return self.rest(cut_at(text, self._stops))

    def rest(self, text: str) -> str:
        """Returns the part of `text`, the answer so far, that has not been returned yet."""
        new = text[len(self._sent) :]
        self._sent += new
        return new


class _CancellableStreamer(TextIteratorStreamer):
    """Stops the generation of its answer once `cancelled` is set."""

    cancelled = False

    def put(self, value: Any) -> None:
        if self.cancelled:
            raise AnswerAbandoned
        super().put(value)


def stream_answer(
    predictor: Predictor, encoded: EncodedRequests, choice: LevelChoice | None, decoding: Decoding
) -> Iterator[str | Answer]:
    """Generates the answer to one encoded request in a background thread; closing the iterator cancels it.

    Yields:
        The text so far, each time it grows, and finally the answer.
    """
    streamer = _CancellableStreamer(predictor.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(1) as executor:
        generation = executor.submit(predictor.answer, encoded, choice, decoding, streamer)
        # Also after an error, so that the loop below ends.
        generation.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))
        try:
            text = ""
            for piece in streamer:
                text += piece
                yield text
            yield generation.result()[0]
        finally:
            streamer.cancelled = True
