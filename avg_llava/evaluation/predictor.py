"""Batched generation: each image is encoded once, then routed or forced to a level, then answered.

Legend: B requests, N images (request after request), G levels.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria

from avg_llava.data.images import load_image, to_rgb
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.outputs import ImageFeatures
from avg_llava.model.processing import IMAGE_PLACEHOLDER, AvgLlavaProcessor


@dataclass(frozen=True)
class Request:
    """A question about images.

    Attributes:
        prompt: What the user says. With one `<image>` per image, these are where the images stand; with none, the
            images come before the text.
        images: The images, or the paths of their files. None for a text-only question.
    """

    prompt: str
    images: tuple[Image.Image | Path, ...] = ()


@dataclass(frozen=True)
class PhaseTimes:
    """Milliseconds that each phase took for the whole batch; `route` is 0 where the level was forced."""

    encode: float
    route: float
    prefill: float
    decode: float


@dataclass(frozen=True)
class Prediction:
    """The answer to one request.

    Attributes:
        text: The answer.
        granularity: Visual tokens per crop, for each image of the request.
        router_probs: The router's probabilities, levels coarse to fine, for each image; None at a forced level.
        num_visual_tokens: Visual tokens that the language model saw, newlines included, over all images.
        timings: Of the batch in which the request was answered.
    """

    text: str
    granularity: tuple[int, ...]
    router_probs: tuple[tuple[float, ...], ...] | None
    num_visual_tokens: int
    timings: PhaseTimes


@dataclass(frozen=True)
class Encoded:
    """A batch of requests whose images are encoded; each level can be answered from it.

    Attributes:
        input_ids: (B, L) prompts with one placeholder per image, padded on the left.
        attention_mask: (B, L).
        features: The encoded images; None where no request has any.
        images_of_request: How many images each request has.
        milliseconds: What the encoding took.
    """

    input_ids: Tensor
    attention_mask: Tensor
    features: ImageFeatures | None
    images_of_request: tuple[int, ...]
    milliseconds: float


@dataclass(frozen=True)
class Choice:
    """What the router makes of an encoded batch.

    Attributes:
        levels: (N,) visual tokens per crop.
        log_probs: (N, G) the router's log-probabilities.
        milliseconds: What the routing took.
    """

    levels: Tensor
    log_probs: Tensor
    milliseconds: float


def cut_at(text: str, stops: Sequence[str]) -> str:
    """An answer up to the first of the texts at which it ends."""
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()


class _FirstTokenClock(StoppingCriteria):
    """Reads the clock when the first new token is there, and never stops the generation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.first is None:
            self.first = _now(self.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _now(device: torch.device) -> float:
    """Milliseconds of a running clock, after the device has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1000


class Predictor:
    """Answers requests with a model, routed or at a forced level.

    Args:
        model: The model, on the device where it shall run.
        processor: Its processor.
    """

    def __init__(self, model: AvgLlavaForConditionalGeneration, processor: AvgLlavaProcessor) -> None:
        self.model = model.eval()
        self.processor = processor

    @property
    def granularities(self) -> list[int]:
        """The model's levels in visual tokens per crop, coarse to fine."""
        return list(self.model.config.granularities or ())

    def predict(
        self,
        requests: Sequence[Request],
        granularity: int | None = None,
        token_cost: float = 0.0,
        max_new_tokens: int = 128,
    ) -> list[Prediction]:
        """Answers a batch greedily.

        Args:
            requests: The batch.
            granularity: Visual tokens per crop for every image; None lets the router choose.
            token_cost: The router's price in nats per doubling of visual tokens.
            max_new_tokens: Longest answer in tokens.
        """
        encoded = self.encode(requests)
        if granularity is not None or encoded.features is None:
            return self.answer(encoded, granularity, max_new_tokens)
        return self.answer(encoded, self.choose(encoded, token_cost), max_new_tokens)

    def inputs(self, requests: Sequence[Request]) -> BatchFeature:
        """What the model takes of a batch: prompts padded on the left, and the pixels of all images."""
        texts = [self._prompt(request) for request in requests]
        images = [
            to_rgb(image) if isinstance(image, Image.Image) else load_image(image)
            for request in requests
            for image in request.images
        ]
        return self.processor(images=images or None, text=texts, padding=True, padding_side="left")

    @torch.inference_mode()
    def encode(self, requests: Sequence[Request]) -> Encoded:
        """Tokenises the prompts, and sends all images through the vision tower and the projector."""
        inputs = self.inputs(requests)
        device = self.model.device
        began = _now(device)
        features = None
        if "pixel_values" in inputs:
            features = self.model.encode_images(inputs["pixel_values"].to(device), inputs["image_sizes"])
        return Encoded(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            features=features,
            images_of_request=tuple(len(request.images) for request in requests),
            milliseconds=_now(device) - began,
        )

    @torch.inference_mode()
    def choose(self, encoded: Encoded, token_cost: float = 0.0) -> Choice:
        """Lets the router choose the level of each image of a batch that has images."""
        if encoded.features is None:
            raise ValueError("the router chooses a level for images, and none of these requests has one")
        began = _now(self.model.device)
        logits = self.model.route(encoded.features, encoded.input_ids, encoded.attention_mask).float()
        levels = self.model.choose_granularity(logits, token_cost)
        return Choice(levels, logits.log_softmax(-1), _now(self.model.device) - began)

    @torch.inference_mode()
    def answer(
        self,
        encoded: Encoded,
        granularity: int | Sequence[int] | Choice | None,
        max_new_tokens: int = 128,
    ) -> list[Prediction]:
        """Answers an encoded batch at given levels.

        Args:
            encoded: The batch.
            granularity: Visual tokens per crop: one number, one per image, or the router's choice. May be None for
                text-only requests.
            max_new_tokens: Longest answer in tokens.
        """
        device = self.model.device
        choice = granularity if isinstance(granularity, Choice) else None
        levels = self._levels(granularity, sum(encoded.images_of_request))
        began = _now(device)
        spliced = self.model.splice(
            encoded.features, encoded.input_ids, encoded.attention_mask, granularity=levels, padding_side="left"
        )
        clock = _FirstTokenClock(device)
        tokens = self.model.generate(
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=spliced.attention_mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            stopping_criteria=[clock],
        )
        ended = _now(device)
        first = clock.first if clock.first is not None else ended
        timings = PhaseTimes(encoded.milliseconds, choice.milliseconds if choice else 0.0, first - began, ended - first)
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)

        predictions, start = [], 0
        for text, num_images in zip(texts, encoded.images_of_request, strict=True):
            own = slice(start, start + num_images)
            start += num_images
            predictions.append(
                Prediction(
                    text=text.strip(),
                    granularity=tuple(levels[own]),
                    router_probs=tuple(map(tuple, choice.log_probs[own].exp().tolist())) if choice else None,
                    num_visual_tokens=int(spliced.num_visual_tokens[own].sum()),
                    timings=timings,
                )
            )
        return predictions

    def _levels(self, granularity: int | Sequence[int] | Choice | None, num_images: int) -> list[int]:
        if isinstance(granularity, Choice):
            return [int(level) for level in granularity.levels]
        if granularity is None:
            if num_images:
                raise ValueError("a level is needed for each image: give one, or the router's choice")
            return []
        levels = [granularity] * num_images if isinstance(granularity, int) else list(granularity)
        for level in levels:
            if level not in self.granularities:
                known = ", ".join(map(str, self.granularities))
                raise ValueError(f"granularity {level} is not one of this model's levels: {known}")
        return levels

    def _prompt(self, request: Request) -> str:
        content = request.prompt
        if IMAGE_PLACEHOLDER not in content:
            content = f"{IMAGE_PLACEHOLDER}\n" * len(request.images) + content
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return str(prompt)
