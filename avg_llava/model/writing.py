"""Writing answers: a batch is generated together, and each of its answers has its own end, draw and streamer.

Shapes: B answers, L tokens of them so far, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria, TopPLogitsWarper
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from avg_llava.model.answers import Decoding, cut_at
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
    """

    ids: list[int]
    text: str
    finish_reason: str


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
    """Ends each answer by itself, tells each streamer its tokens, and reads the clock at the first token."""

    def __init__(
        self,
        decodings: Sequence[Decoding],
        streamers: Sequence[BaseStreamer | None],
        closing: set[int],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        self.decodings, self.streamers, self.closing = decodings, streamers, closing
        self.tokenizer, self.device = tokenizer, device
        self.ids: list[list[int]] = [[] for _ in decodings]
        self.reasons: list[str | None] = [None] * len(decodings)
        self.first: float | None = None
        for row in range(len(decodings)):
            self._tell(row, torch.empty(1, 0, dtype=torch.long))  # the prompt, which streamers expect before all else

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, L) tokens so far -> (B,) bool, True where the answer has ended."""
        if self.first is None:
            self.first = now(self.device)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.reasons[row] is None:
                self.ids[row].append(token)
                self._tell(row, torch.tensor([token]))
                self.reasons[row] = self.reasons[row] or self._reason(row)
                if self.reasons[row]:
                    self._end(row)
        return torch.tensor([reason is not None for reason in self.reasons], device=input_ids.device)

    def written(self) -> list[Written]:
        """The answers, after all have ended."""
        return [
            Written(ids, cut_at(self._text(row), self.decodings[row].stop), str(self.reasons[row]))
            for row, ids in enumerate(self.ids)
        ]

    def _reason(self, row: int) -> str | None:
        ids, decoding = self.ids[row], self.decodings[row]
        if ids[-1] in self.closing:
            return "stop"
        if decoding.stop:
            text = self._text(row)
            if any(stop in text for stop in decoding.stop):
                return "stop"
        return "length" if len(ids) >= decoding.max_new_tokens else None

    def _text(self, row: int) -> str:
        return str(self.tokenizer.decode(self.ids[row], skip_special_tokens=True))

    def _tell(self, row: int, tokens: Tensor) -> None:
        streamer = self.streamers[row]
        try:
            if streamer is not None:
                streamer.put(tokens)
        except AnswerAbandoned:
            self.reasons[row] = "abandoned"

    def _end(self, row: int) -> None:
        streamer = self.streamers[row]
        if streamer is not None and self.reasons[row] != "abandoned":
            streamer.end()


def write(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    spliced: SplicedInputs,
    decodings: Sequence[Decoding],
    streamers: Sequence[BaseStreamer | None],
    cache: Cache | None = None,
) -> tuple[list[Written], float, float]:
    """Generates the answers to B spliced prompts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        spliced: The prompts, padded on the left.
        decodings: How each answer is written.
        streamers: What takes each answer's tokens as they come.
        cache: Holds a beginning of the prompts that is not computed anew.

    Returns:
        The answers, and when the first and the last of their tokens were there, on the clock in milliseconds.
    """
    closing = model.generation_config.eos_token_id
    device = spliced.inputs_embeds.device
    ends = Ends(decodings, streamers, set(closing if isinstance(closing, list) else [closing]), tokenizer, device)
    drawn = any(decoding.temperature > 0 for decoding in decodings)
    model.generate(
        inputs_embeds=spliced.inputs_embeds,
        attention_mask=spliced.attention_mask,
        past_key_values=cache,
        max_new_tokens=max(decoding.max_new_tokens for decoding in decodings),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=[Draws(decodings)] if drawn else [],
        stopping_criteria=[ends],
    )
    ended = now(device)
    return ends.written(), ended if ends.first is None else ends.first, ended


__all__ = ["AnswerAbandoned", "Draws", "Ends", "Written", "now", "write"]
