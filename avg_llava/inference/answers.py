"""What is asked and what comes back: requests, how answers are written, and answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ImageInput = Image.Image | Path | str | bytes
"""A Pillow image, the path of an image file, or what such a file holds."""


@dataclass(frozen=True)
class Request:
    """A question about images.

    Attributes:
        prompt: What the user says, or a conversation as transformers' chat templates take it: messages with `role` and
            `content`. With one `<image>` per image, these are where the images stand; with none in a single question,
            the images come before the text.
        images: The images, in the order of their places. Empty for a text-only question.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """How an answer is written.

    Attributes:
        max_new_tokens: Longest answer in tokens.
        temperature: 0 takes the likeliest token, the paper's way; above it, tokens are drawn.
        top_p: Draw from the likeliest tokens that together have this probability.
        stop: Texts at which an answer ends; they are not part of it.
        seed: Draws with the same seed are the same, whatever else is in the batch; None draws anew each time.
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
            raise ValueError("a text at which an answer stops must not be empty")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be 0 or more and below 2**63, got {self.seed}")


@dataclass(frozen=True)
class PhaseTimes:
    """Milliseconds that each phase took for a batch; `route` is 0 where the level was forced."""

    encode: float
    route: float
    prefill: float
    decode: float

    @property
    def first_token(self) -> float:
        """Milliseconds until the first token was there."""
        return self.encode + self.route + self.prefill


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    Attributes:
        text: The answer.
        granularity: Visual tokens per crop, for each image of the request.
        router_probs: The router's probabilities, levels coarse to fine, for each image; None at a forced level.
        num_visual_tokens: Visual tokens that the language model saw, newlines included, over all images.
        num_prompt_tokens: Tokens of the prompt, visual ones included.
        num_new_tokens: Tokens of the answer, the closing one included.
        finish_reason: "stop", "length" where `max_new_tokens` cut the answer off, "abandoned" where its streamer did.
        timings: Of the batch in which the request was answered: encoding and routing of all its requests, prefill of
            those at the same level, and decoding of these up to this answer's end.
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
    """An answer up to the first of the texts at which it ends."""
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()


__all__ = ["Answer", "Decoding", "ImageInput", "PhaseTimes", "Request", "cut_at"]
