"""Answers to questions about images: each image is encoded once, then routed or forced to a level, then answered.

Legend: B requests, N images (request after request), G levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.generation.streamers import BaseStreamer

from avg_llava.inference.answers import Answer, Decoding, ImageInput, PhaseTimes, Request
from avg_llava.inference.budget import Budget, best_levels
from avg_llava.inference.generation import Written, now, write
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.images import decode_image, load_image, to_rgb
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.outputs import ImageFeatures
from avg_llava.model.processing import IMAGE_PLACEHOLDER, AvgLlavaProcessor
from avg_llava.model.router import level_values


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

    def slices(self) -> list[slice]:
        """The images of each request."""
        ends = [sum(self.images_of_request[: row + 1]) for row in range(len(self.images_of_request))]
        return [slice(end - count, end) for end, count in zip(ends, self.images_of_request, strict=True)]

    def of_requests(self, rows: Sequence[int]) -> "Encoded":
        """Some of the requests."""
        return Encoded(
            self.input_ids[rows],
            self.attention_mask[rows],
            None if self.features is None else self.features.of_images(self.numbers(rows)),
            tuple(self.images_of_request[row] for row in rows),
            self.milliseconds,
        )

    def numbers(self, rows: Sequence[int]) -> list[int]:
        """The images of some of the requests."""
        images = self.slices()
        return [number for row in rows for number in range(images[row].start, images[row].stop)]


@dataclass(frozen=True)
class Choice:
    """The levels of an encoded batch.

    Attributes:
        levels: Visual tokens per crop for each of the N images.
        log_probs: (N, G) the router's log-probabilities; None where every level was forced, so that it did not run.
        milliseconds: What the routing took.
    """

    levels: list[int]
    log_probs: Tensor | None = None
    milliseconds: float = 0.0

    def router_probs(self, images: slice) -> tuple[tuple[float, ...], ...] | None:
        """The router's probabilities for some images; None for no images, or where it did not run."""
        if self.log_probs is None or not self.levels[images]:
            return None
        return tuple(map(tuple, self.log_probs[images].exp().tolist()))


Streamers: TypeAlias = BaseStreamer | Sequence[BaseStreamer | None] | None
"""What takes tokens as they come: of a single request, or one for each of several, None where nobody listens."""


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
        budget: Budget | Sequence[Budget] = Budget(),
        decoding: Decoding | Sequence[Decoding] = Decoding(),
        streamer: Streamers = None,
    ) -> list[Answer]:
        """Answers a batch. Requests at the same level are answered together, so that none waits for a finer one.

        Args:
            requests: The batch.
            budget: How the levels are found; one for all requests, or one for each.
            decoding: How the answers are written; likewise.
            streamer: Takes the tokens as they come.
        """
        encoded = self.encode(requests)
        levels = None if encoded.features is None else self.choose(encoded, budget)
        return self.answer(encoded, levels, decoding, streamer)

    def inputs(self, requests: Sequence[Request]) -> BatchFeature:
        """What the model takes of a batch: prompts padded on the left, and the pixels of all images."""
        texts = [self.prompt_text(request) for request in requests]
        images = [[open_image(image, place) for place, image in enumerate(request.images, 1)] for request in requests]
        return self.processor(images=images, text=texts, padding=True, padding_side="left")

    @torch.inference_mode()
    def encode(self, requests: Sequence[Request]) -> Encoded:
        """Tokenises the prompts, and sends all images through the vision tower and the projector."""
        inputs = self.inputs(requests)
        device = self.model.device
        began = now(device)
        features = None
        if "pixel_values" in inputs:
            features = self.model.encode_images(inputs["pixel_values"].to(device), inputs["image_sizes"])
        return Encoded(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            features=features,
            images_of_request=tuple(len(request.images) for request in requests),
            milliseconds=now(device) - began,
        )

    @torch.inference_mode()
    def choose(self, encoded: Encoded, budget: Budget | Sequence[Budget] = Budget()) -> Choice:
        """Finds the level of each image of a batch that has images; the router runs only where it is asked.

        Raises:
            BudgetError: The images of a request do not fit into its budget.
        """
        if encoded.features is None:
            raise ValueError("the router chooses a level for images, and none of these requests has one")
        budgets = [budget] * len(encoded.images_of_request) if isinstance(budget, Budget) else list(budget)
        sizes = [encoded.features.image_sizes[own] for own in encoded.slices()]
        owners = [own for own, count in zip(budgets, encoded.images_of_request, strict=True) for _ in range(count)]
        if all(own.granularity is not None for own in owners):
            values = [[0.0] * len(self.granularities)] * len(owners)
            return Choice(self.levels_within(sizes, budgets, values))
        began = now(self.model.device)
        logits = self.model.route(encoded.features, encoded.input_ids, encoded.attention_mask).float()
        prices = torch.tensor([own.token_cost for own in owners], device=logits.device)
        worth = level_values(logits, self.granularities, prices)
        levels = self.levels_within(sizes, budgets, worth.tolist())
        return Choice(levels, logits.log_softmax(-1), now(self.model.device) - began)

    @torch.inference_mode()
    def answer(
        self,
        encoded: Encoded,
        granularity: int | Sequence[int] | Choice | None,
        decoding: Decoding | Sequence[Decoding] = Decoding(),
        streamer: Streamers = None,
        tell: Callable[[int, Answer], object] = lambda row, answer: None,
    ) -> list[Answer]:
        """Answers an encoded batch at given levels.

        Args:
            encoded: The batch.
            granularity: Visual tokens per crop: one number, one per image, or the router's choice. May be None for
                text-only requests.
            decoding: How the answers are written; one for all requests, or one for each.
            streamer: Takes the tokens as they come.
            tell: Called with a request's place in the batch and its answer, as soon as that has ended.
        """
        num_requests = len(encoded.images_of_request)
        decodings = [decoding] * num_requests if isinstance(decoding, Decoding) else list(decoding)
        streamers: list[BaseStreamer | None] = list(streamer) if isinstance(streamer, Sequence) else [streamer]
        if streamer is None:
            streamers *= num_requests
        if not len(decodings) == len(streamers) == num_requests:
            raise ValueError(
                f"{num_requests} requests come with {len(decodings)} decodings and {len(streamers)} streamers; each "
                "needs its own"
            )
        levels = self._levels(granularity, sum(encoded.images_of_request))
        rows_of_level: dict[int, list[int]] = {}
        for row, own in enumerate(encoded.slices()):
            rows_of_level.setdefault(max(levels[own], default=0), []).append(row)
        answers: dict[int, Answer] = {}
        for rows in rows_of_level.values():
            numbers = encoded.numbers(rows)
            group = Choice([levels[number] for number in numbers])
            if isinstance(granularity, Choice) and granularity.log_probs is not None:
                group = replace(group, log_probs=granularity.log_probs[numbers], milliseconds=granularity.milliseconds)

            def keep(place: int, answer: Answer, rows: Sequence[int] = rows) -> None:
                answers[rows[place]] = answer
                tell(rows[place], answer)

            own_decodings, own_streamers = [decodings[row] for row in rows], [streamers[row] for row in rows]
            self._answer_group(encoded.of_requests(rows), group, own_decodings, own_streamers, keep)
        return [answers[row] for row in range(len(answers))]

    def _answer_group(
        self,
        encoded: Encoded,
        choice: Choice,
        decodings: Sequence[Decoding],
        streamers: Sequence[BaseStreamer | None],
        keep: Callable[[int, Answer], None],
    ) -> None:
        """Answers requests at the same level together."""
        began = now(self.model.device)
        spliced = self.model.splice(
            encoded.features, encoded.input_ids, encoded.attention_mask, granularity=choice.levels, padding_side="left"
        )
        images_of_row = encoded.slices()
        visual_tokens, prompt_tokens = spliced.num_visual_tokens.tolist(), spliced.attention_mask.sum(1).tolist()

        def tell(row: int, written: Written) -> None:
            own = images_of_row[row]
            answer = Answer(
                text=written.text,
                granularity=tuple(choice.levels[own]),
                router_probs=choice.router_probs(own),
                num_visual_tokens=sum(visual_tokens[own]),
                num_prompt_tokens=prompt_tokens[row],
                num_new_tokens=len(written.ids),
                finish_reason=written.finish_reason,
                timings=PhaseTimes(
                    encoded.milliseconds, choice.milliseconds, written.first - began, written.ended - written.first
                ),
            )
            keep(row, answer)

        write(self.model, self.processor.tokenizer, spliced, decodings, streamers, tell)

    def levels_within(
        self,
        image_sizes: Sequence[Sequence[tuple[int, int]]],
        budgets: Sequence[Budget],
        values: Sequence[Sequence[float]],
    ) -> list[int]:
        """Visual tokens per crop for each image: the level that its request forces, or those of most value.

        Args:
            image_sizes: For each request its images' (height, width) in pixels.
            budgets: The budget of each request.
            values: What each level is worth, image after image.
        """
        granularities, rows, chosen = self.granularities, iter(values), []
        for budget, sizes in zip(budgets, image_sizes, strict=True):
            known = granularities if budget.granularity is None else self._levels(budget.granularity, 1)
            places = [granularities.index(level) for level in known]
            worth = [[row[place] for place in places] for _, row in zip(sizes, rows, strict=False)]
            if budget.max_visual_tokens is None:
                best = [row.index(max(row)) for row in worth]
            else:
                tokens = [[num_visual_tokens(size, level, self.model.config) for level in known] for size in sizes]
                best = best_levels(worth, tokens, budget.max_visual_tokens)
            chosen += [known[place] for place in best]
        return chosen

    def _levels(self, granularity: int | Sequence[int] | Choice | None, num_images: int) -> list[int]:
        if isinstance(granularity, Choice):
            return granularity.levels
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

    def prompt_text(self, request: Request) -> str:
        """A request in the format of the model's training, ready for the answer."""
        messages = request.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": with_placeholders(messages, len(request.images))}]
        prompt = self.processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return str(prompt)


def with_placeholders(question: str, num_images: int) -> str:
    """A question with its images before it, unless it says itself where they stand."""
    return question if IMAGE_PLACEHOLDER in question else f"{IMAGE_PLACEHOLDER}\n" * num_images + question


def open_image(image: ImageInput, place: int) -> Image.Image:
    """An RGB image."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    return decode_image(image, f"image {place}") if isinstance(image, bytes) else load_image(image)


def as_images(images: ImageInput | Sequence[ImageInput] | None) -> tuple[ImageInput, ...]:
    """One image, several or none, as a tuple."""
    return () if images is None else (images,) if isinstance(images, ImageInput) else tuple(images)


__all__ = ["Choice", "Encoded", "Predictor"]
