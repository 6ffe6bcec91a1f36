"""Generates the answers to a batch of spliced prompts; sampling, streaming and stopping are per answer.

Shapes: B answers, L tokens generated so far, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """The tokens of one answer.

    Attributes:
        ids: Token ids, the closing one included.
        text: Decoded answer, cut at the first stop text.
        finish_reason: "stop", "length" (`max_new_tokens` reached) or "abandoned" (by its streamer).
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
    that is decoded greedily. Each row has a separate generator: a seed gives the same answer in every batch.
    """

    def __init__(self, decodings: Sequence[Decoding]) -> None:
        self._sampled = [
            (row, decoding, _generator(decoding.seed))
            for row, decoding in enumerate(decodings)
            if decoding.temperature > 0
        ]

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


def _generator(seed: int | None) -> torch.Generator:
    """A generator with the given seed; None takes one from torch's global generator."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)


class StepTimer:
    """Records when the first and the latest token of a batch were ready, in milliseconds of :func:`now`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.first = self.latest = math.nan

    def tick(self) -> None:
        """Records the end of a step."""
        self.latest = now(self._device)
        if math.isnan(self.first):
            self.first = self.latest


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


class PerRequestStopping:
    """Decides when each answer of a batch ends.

    Args:
        decodings: For each answer its stop texts and maximum length.
        closing_ids: Tokens that end every answer.
        tokenizer: Decodes answers that have stop texts.
    """

    def __init__(
        self, decodings: Sequence[Decoding], closing_ids: set[int], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._decodings, self._closing_ids, self._tokenizer = decodings, closing_ids, tokenizer

    def finish_reason(self, row: int, stream: TokenStream) -> str | None:
        """The reason for which an answer ends at its latest token; None if it goes on."""
        decoding = self._decodings[row]
        if stream.abandoned:
            return "abandoned"
        if stream.ids[-1] in self._closing_ids:
            return "stop"
        if decoding.stop:
            text = decode(self._tokenizer, stream.ids)
            if any(stop in text for stop in decoding.stop):
                return "stop"
        return "length" if len(stream.ids) >= decoding.max_new_tokens else None


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


class TokenHook(StoppingCriteria):
    """Called by transformers after each token: ticks the timer, streams the token and ends finished answers.

    Only stopping criteria may end single answers of a batch, and they run before transformers' own streamer; so the
    streamers, which may abandon an answer, are fed here.

    Args:
        timer: Ticks once per step.
        streams: One for each answer.
        stopping: Decides when an answer ends.
        on_finish: Called with an answer's row and finish reason in the step in which it ends.
    """

    def __init__(
        self,
        timer: StepTimer,
        streams: Sequence[TokenStream],
        stopping: PerRequestStopping,
        on_finish: Callable[[int, str], None],
    ) -> None:
        self._timer, self._streams, self._stopping, self._on_finish = timer, streams, stopping, on_finish
        self._is_finished = [False] * len(streams)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, L) tokens so far -> (B,) bool, True for answers that have ended."""
        self._timer.tick()
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self._is_finished[row]:
                continue
            self._streams[row].put(token)
            reason = self._stopping.finish_reason(row, self._streams[row])
            if reason is not None:
                self._is_finished[row] = True
                self._on_finish(row, reason)
        return torch.tensor(self._is_finished, device=input_ids.device)


def generate(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    spliced: SplicedInputs,
    decodings: Sequence[Decoding],
    streamers: Sequence[BaseStreamer | None],
    on_answer: Callable[[int, GeneratedAnswer], object] = lambda row, answer: None,
    cache: Cache | None = None,
) -> list[GeneratedAnswer]:
    """Generates the answers to B spliced prompts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        spliced: The prompts, padded on the left.
        decodings: Length, sampling and stop texts of each answer.
        streamers: Receives the tokens of each answer as they are generated; None for none.
        on_answer: Called with an answer's row and the answer as soon as it ends.
        cache: Keys and values of a prefix of the prompts, which is not computed again.
    """
    device = spliced.inputs_embeds.device
    eos = model.generation_config.eos_token_id
    timer, streams = StepTimer(device), [TokenStream(streamer) for streamer in streamers]
    stopping = PerRequestStopping(decodings, set(eos if isinstance(eos, list) else [eos]), tokenizer)
    answers: dict[int, GeneratedAnswer] = {}

    def finish(row: int, reason: str) -> None:
        stream = streams[row]
        text = cut_at(decode(tokenizer, stream.ids), decodings[row].stop)
        answers[row] = GeneratedAnswer(stream.ids, text, reason, timer.first, timer.latest)
        on_answer(row, answers[row])
        stream.end()

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
        stopping_criteria=[TokenHook(timer, streams, stopping, finish)],
    )
    assert len(answers) == len(decodings), "generation stopped before every answer had ended"
    return [answers[row] for row in range(len(decodings))]
