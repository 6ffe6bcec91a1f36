"""Generates the answers to a batch of spliced prompts; sampling, streaming and stopping are per answer.

Shapes: B answers, L tokens generated so far, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria, TopPLogitsWarper
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from avg_llava.inference.answers import Decoding, cut_at
from avg_llava.model.splice import SplicedInputs


class AnswerAbandoned(Exception):
    """Raised by a streamer's `put` to end its answer early; the rest of the batch goes on."""


@dataclass(frozen=True)
class GeneratedAnswer:
    """One answer; `text` and `finish_reason` as of :class:`Answer`.

    Attributes:
        ids: Token ids, the closing one included.
        first: Time of the batch's first token, milliseconds of :func:`now`.
        ended: Time of this answer's last token.
    """

    ids: list[int]
    text: str
    finish_reason: str
    first: float
    ended: float


def now(device: torch.device) -> float:
    """Milliseconds of a monotonic clock, read after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1000


class GumbelSampler(LogitsProcessor):
    """Gumbel-max sampling; greedy rows are unchanged.

    The argmax of logits plus Gumbel noise is a sample of their softmax, so sampled and greedy answers can share a batch
    that is decoded greedily. Each row has a separate generator: a seed gives the same answer in every batch. Without a
    seed, torch's global generator gives one.
    """

    def __init__(self, decodings: Sequence[Decoding]) -> None:
        self._sampled: list[tuple[int, Decoding, torch.Generator]] = []
        for row, decoding in enumerate(decodings):
            if decoding.temperature > 0:
                seed = int(torch.randint(2**62, ())) if decoding.seed is None else decoding.seed
                self._sampled.append((row, decoding, torch.Generator().manual_seed(seed)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, L) tokens and (B, V) logits -> (B, V) scores whose argmax is the next token."""
        scores = scores.clone()
        for row, decoding, generator in self._sampled:
            # Shifted to at most 0 and in double precision, so that no temperature overflows.
            logits = (scores[row] - scores[row].max()).double() / decoding.temperature
            logits = TopPLogitsWarper(decoding.top_p)(input_ids, logits[None])[0] if decoding.top_p < 1 else logits
            uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
            scores[row] = (logits - (-uniform.log()).log().to(logits)).to(scores)
        return scores


class TokenStream:
    """Collects the tokens of one answer and forwards them to its streamer.

    Attributes:
        ids: Tokens so far.
        abandoned: True once the streamer has raised :class:`AnswerAbandoned`.
    """

    def __init__(self, streamer: BaseStreamer | None) -> None:
        self._streamer = streamer
        self.ids: list[int] = []
        self.abandoned = False
        self._forward(torch.empty(1, 0, dtype=torch.long))  # streamers expect the prompt first

    def put(self, token: int) -> None:
        """Takes the next token, unless the answer is abandoned."""
        if not self.abandoned:
            self.ids.append(token)
            self._forward(torch.tensor([token]))

    def end(self) -> None:
        """Ends the streamer, unless it has abandoned the answer."""
        if self._streamer is not None and not self.abandoned:
            self._streamer.end()

    def _forward(self, tokens: Tensor) -> None:
        try:
            if self._streamer is not None:
                self._streamer.put(tokens)
        except AnswerAbandoned:
            self.abandoned = True


class PerRequestStopping(StoppingCriteria):
    """Ends single answers of a batch. Called by transformers after each step.

    Only stopping criteria may end single answers, and they run before transformers' own streamer; so `on_token` feeds
    the streamers, which may abandon an answer.

    Args:
        num_answers: B.
        on_token: Called with the row and the new token of each answer that goes on; returns True if the token ends it.

    Attributes:
        times: When the token of each step was ready, milliseconds of :func:`now`.
    """

    def __init__(self, num_answers: int, on_token: Callable[[int, int], bool]) -> None:
        self.times: list[float] = []
        self._has_ended = [False] * num_answers
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, L) tokens so far -> (B,) bool, True for answers that have ended."""
        self.times.append(now(input_ids.device))
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self._has_ended[row]:
                self._has_ended[row] = self._on_token(row, token)
        return torch.tensor(self._has_ended, device=input_ids.device)


def finish_reason(
    stream: TokenStream, decoding: Decoding, closing_ids: set[int], decode: Callable[[list[int]], str]
) -> str | None:
    """The reason for which an answer ends at its latest token; None if it goes on."""
    if stream.abandoned:
        return "abandoned"
    if stream.ids[-1] in closing_ids:
        return "stop"
    if decoding.stop:
        text = decode(stream.ids)
        if any(stop in text for stop in decoding.stop):
            return "stop"
    return "length" if len(stream.ids) >= decoding.max_new_tokens else None


def generate(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    spliced: SplicedInputs,
    decodings: Sequence[Decoding],
    streamers: Sequence[BaseStreamer | None],
    on_answer: Callable[[int, GeneratedAnswer], object] = lambda row, answer: None,
    cache: Cache | None = None,
) -> list[GeneratedAnswer]:
    """Generates the answers to B spliced prompts, which are padded on the left.

    Args:
        streamers: Receives the tokens of each answer as they are generated; None for none.
        on_answer: Called with an answer's row and the answer as soon as it ends.
        cache: Keys and values of a prefix of the prompts, which is not computed again.
    """
    eos = model.generation_config.eos_token_id
    closing_ids = set(eos if isinstance(eos, list) else [eos])
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    streams = [TokenStream(streamer) for streamer in streamers]
    answers: dict[int, GeneratedAnswer] = {}

    def on_token(row: int, token: int) -> bool:
        stream, decoding = streams[row], decodings[row]
        stream.put(token)
        reason = finish_reason(stream, decoding, closing_ids, decode)
        if reason is None:
            return False
        text = cut_at(decode(stream.ids), decoding.stop)
        answers[row] = GeneratedAnswer(stream.ids, text, reason, stopping.times[0], stopping.times[-1])
        on_answer(row, answers[row])
        stream.end()
        return True

    stopping = PerRequestStopping(len(decodings), on_token)
    is_sampled = any(decoding.temperature > 0 for decoding in decodings)
    model.generate(
        inputs_embeds=spliced.inputs_embeds,
        attention_mask=spliced.attention_mask,
        past_key_values=cache,
        cache_implementation=model.generation_config.cache_implementation if cache is None else None,
        max_new_tokens=max(decoding.max_new_tokens for decoding in decodings),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=[GumbelSampler(decodings)] if is_sampled else [],
        stopping_criteria=[stopping],
    )
    assert len(answers) == len(decodings), "generation stopped before every answer had ended"
    return [answers[row] for row in range(len(decodings))]
