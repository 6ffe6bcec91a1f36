"""Requests, decoding options and answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ImageInput = Image.Image | Path | str | bytes
"""A Pillow image, the path of an image file, or the bytes of one."""


@dataclass(frozen=True)
class Request:
    """A question about images.

    Attributes:
        prompt: A question, or a conversation in the format of transformers' chat templates: messages with `role` and
            `content`. It holds one `<image>` per image; a question without any gets them before its text.
        images: The images, in the order of their placeholders. Empty for a text-only question.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """Length, sampling and stop texts of an answer.

    Attributes:
        max_new_tokens: Maximum length in tokens.
        temperature: 0 decodes greedily, as in the paper; above 0, tokens are sampled.
        top_p: Nucleus sampling: the smallest set of most probable tokens with this total probability.
        stop: Texts at which an answer ends; they are not part of it.
        seed: Makes sampling reproducible, independent of the rest of the batch; None differs from call to call.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if "" in self.stop:
            raise ValueError("a stop text must not be empty")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be 0 or more and below 2**63, got {self.seed}")


@dataclass(frozen=True)
class PhaseTimes:
    """Milliseconds of each phase for a batch; `route` is 0 if the level was forced."""

    encode: float
    route: float
    prefill: float
    decode: float

    @property
    def first_token(self) -> float:
        """Time to first token in milliseconds."""
        return self.encode + self.route + self.prefill


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    Attributes:
        text: The answer, without special tokens.
        granularity: Visual tokens per crop of each image.
        router_probs: For each image the router's probabilities, levels coarse to fine; None at a forced level.
        num_visual_tokens: Visual tokens in the prompt, newlines included, over all images.
        num_prompt_tokens: Tokens of the prompt, visual tokens included.
        num_new_tokens: Tokens of the answer, the closing token included.
        finish_reason: "stop", "length" (`max_new_tokens` reached) or "abandoned" (by its streamer).
        timings: Times of the request's batch: encoding and routing of all requests, prefill of those at the same level,
            decoding up to the end of this answer.
    """

    text: str
    granularity: tuple[int, ...]
    router_probs: tuple[tuple[float, ...], ...] | None
    num_visual_tokens: int
    num_prompt_tokens: int
    num_new_tokens: int
    finish_reason: str
    timings: PhaseTimes


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Cuts an answer at its first stop text and strips it."""
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()
