"""Writing answers: a batch is generated together, and each of its answers has its own end, draw and streamer.

Shapes: B answers, L tokens of them so far, V vocabulary.
"""

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
    """What a streamer's `put` raises when nobody waits for the rest of its answer: that answer ends, no other."""


@dataclass(frozen=True)
class Written:
    """An answer as it was written.

    Attributes:
        ids: Its tokens, the closing one included.
        text: What they say, up to the first text at which the answer had to stop.
        finish_reason: "stop", "length" where `max_new_tokens` cut it off, "abandoned" where its streamer did.
        first: When the first token of the batch was there, on the clock in milliseconds.
        ended: When this answer's last token was there.
    """

    ids: list[int]
    text: str
    finish_reason: str
    first: float
    ended: float


def now(device: torch.device) -> float:
    """Milliseconds of a running clock, after the device has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1000


class Draws(LogitsProcessor):
    """Draws the next token of each answer that has a temperature; the likeliest of the others stays the likeliest.

    Scores get Gumbel noise, under which the largest is a draw from their softmax. So drawn and other answers share a
    batch, and as each has a generator of its own, a seed gives the same answer in every batch.
    """

    def __init__(self, decodings: Sequence[Decoding]) -> None:
        self._drawn = [(row, own, _generator(own.seed)) for row, own in enumerate(decodings) if own.temperature > 0]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, L) tokens and (B, V) logits -> (B, V) scores whose largest is the next token."""
        scores = scores.clone()
        for row, decoding, generator in self._drawn:
            # At most 0 and, in double precision, a number at any temperature.
            own = (scores[row] - scores[row].max()).double() / decoding.temperature
            own = TopPLogitsWarper(decoding.top_p)(input_ids, own[None])[0] if decoding.top_p < 1 else own
            uniform = torch.rand(own.shape, generator=generator, dtype=torch.float64)
            scores[row] = (own - (-uniform.log()).log().to(own)).to(scores)
        return scores


def _generator(seed: int | None) -> torch.Generator:
    """Without a seed, torch's own generator gives one."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)


class Ends(StoppingCriteria):
    """Ends each answer by itself, tells each streamer its tokens, and reads the clock.

    Attributes:
        written: The answers that have ended; None for the others.
    """

    def __init__(
        self,
        decodings: Sequence[Decoding],
        streamers: Sequence[BaseStreamer | None],
        closing: set[int],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        tell: Callable[[int, Written], object],
    ) -> None:
        self.decodings, self.streamers, self.closing = decodings, streamers, closing
        self.tokenizer, self.device, self.tell = tokenizer, device, tell
        self.written: list[Written | None] = [None] * len(decodings)
        self._ids: list[list[int]] = [[] for _ in decodings]
        self._first: float | None = None
        prompt = torch.empty(1, 0, dtype=torch.long)  # not told; but streamers expect it before all else
        self._abandoned = [not self._is_taken(row, prompt) for row in range(len(decodings))]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, L) tokens so far -> (B,) bool, True where the answer has ended."""
        moment = now(self.device)
        self._first = moment if self._first is None else self._first
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.written[row] is None:
                self._add(row, token, self._first, moment)
        return torch.tensor([written is not None for written in self.written], device=input_ids.device)

    def _add(self, row: int, token: int, first: float, moment: float) -> None:
        ids, decoding = self._ids[row], self.decodings[row]
        if not self._abandoned[row]:
            ids.append(token)
            self._abandoned[row] = not self._is_taken(row, torch.tensor([token]))
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)) if decoding.stop else ""
        if self._abandoned[row]:
            reason = "abandoned"
        elif token in self.closing or any(stop in text for stop in decoding.stop):
            reason = "stop"
        elif len(ids) >= decoding.max_new_tokens:
            reason = "length"
        else:
            return
        text = cut_at(str(self.tokenizer.decode(ids, skip_special_tokens=True)), decoding.stop)
        written = self.written[row] = Written(ids, text, reason, first, moment)
        self.tell(row, written)
        streamer = self.streamers[row]
        if streamer is not None and reason != "abandoned":
            streamer.end()

    def _is_taken(self, row: int, tokens: Tensor) -> bool:
        streamer = self.streamers[row]
        try:
            if streamer is not None:
                streamer.put(tokens)
        except AnswerAbandoned:
            return False
        return True


def write(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    spliced: SplicedInputs,
    decodings: Sequence[Decoding],
    streamers: Sequence[BaseStreamer | None],
    tell: Callable[[int, Written], object] = lambda row, written: None,
    cache: Cache | None = None,
) -> list[Written]:
    """Generates the answers to B spliced prompts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        spliced: The prompts, padded on the left.
        decodings: How each answer is written.
        streamers: What takes each answer's tokens as they come.
        tell: Called with each answer's place in the batch and the answer, as soon as it has ended.
        cache: Holds a beginning of the prompts that is not computed anew.
    """
    closing = model.generation_config.eos_token_id
    device = spliced.inputs_embeds.device
    ends = Ends(decodings, streamers, set(closing if isinstance(closing, list) else [closing]), tokenizer, device, tell)
    drawn = any(decoding.temperature > 0 for decoding in decodings)
    model.generate(
        inputs_embeds=spliced.inputs_embeds,
        attention_mask=spliced.attention_mask,
        past_key_values=cache,
        cache_implementation=model.generation_config.cache_implementation if cache is None else None,
        max_new_tokens=max(decoding.max_new_tokens for decoding in decodings),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=[Draws(decodings)] if drawn else [],
        stopping_criteria=[ends],
    )
    written = [own for own in ends.written if own is not None]
    assert len(written) == len(decodings), "generation stopped before every answer had ended"
    return written


__all__ = ["AnswerAbandoned", "Draws", "Ends", "Written", "now", "write"]
