"""Answers that are read while they are written."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import TextIteratorStreamer

from avg_llava.inference.answers import Answer, Decoding
from avg_llava.inference.generation import AnswerAbandoned
from avg_llava.inference.predictor import Choice, Encoded, Predictor


class _Pieces(TextIteratorStreamer):
    """Text as it is written, until nobody reads it any more."""

    abandoned = False

    def put(self, value: Any) -> None:
        if self.abandoned:
            raise AnswerAbandoned
        super().put(value)


def stream_answer(
    predictor: Predictor, encoded: Encoded, choice: Choice | None, decoding: Decoding
) -> Iterator[str | Answer]:
    """Answers an encoded request in a thread of its own; closed before its end, it stops the writing.

    Yields:
        The text so far, whenever there is more of it; last, the answer.

    Raises:
        Exception: Whatever happened in the thread.
    """
    pieces = _Pieces(predictor.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(predictor.answer, encoded, choice, decoding, pieces)
        # An error ends the text, too: the reader shall not wait for ever.
        writing.add_done_callback(lambda _: pieces.text_queue.put(pieces.stop_signal))
        try:
            text = ""
            for piece in pieces:
                text += piece
                yield text
            yield writing.result()[0]
        finally:
            pieces.abandoned = True


__all__ = ["stream_answer"]
