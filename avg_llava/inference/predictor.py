"""Answers requests in three steps: encode the images once, choose their levels, generate the answers.

Legend: B requests, N images (request after request), G levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.generation.streamers import BaseStreamer

from avg_llava.inference.answers import Answer, Decoding, ImageInput, PhaseTimes, Request
from avg_llava.inference.budget import Budget, select_levels
from avg_llava.inference.generation import GeneratedAnswer, generate, now
from avg_llava.model.images import decode_image, load_image, to_rgb
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration, ImageFeatures
from avg_llava.model.processing import AvgLlavaProcessor
from avg_llava.model.router import level_values
from avg_llava.model.templates import IMAGE_PLACEHOLDER


@dataclass(frozen=True)
class EncodedRequests:
    """A batch of requests whose images are encoded; it can be answered at every level.

    Attributes:
        input_ids: (B, L) prompts with one placeholder per image, padded on the left.
        attention_mask: (B, L).
        features: None if no request has images.
        images_per_request: B numbers.
        milliseconds: Encoding time.
    """

    input_ids: Tensor
    attention_mask: Tensor
    features: ImageFeatures | None
    images_per_request: tuple[int, ...]
    milliseconds: float

    def image_slices(self) -> list[slice]:
        """For each request the slice of its images."""
        ends = list(accumulate(self.images_per_request))
        return [slice(end - count, end) for end, count in zip(ends, self.images_per_request, strict=True)]

    def of_requests(self, rows: Sequence[int]) -> "EncodedRequests":
        """A batch of some of the requests."""
        slices = self.image_slices()
        images = [image for row in rows for image in range(slices[row].start, slices[row].stop)]
        return EncodedRequests(
            self.input_ids[rows],
            self.attention_mask[rows],
            None if self.features is None else self.features.of_images(images),
            tuple(self.images_per_request[row] for row in rows),
            self.milliseconds,
        )


@dataclass(frozen=True)
class LevelChoice:
    """The levels of a batch's images.

    Attributes:
        levels: Visual tokens per crop for each of the N images.
        log_probs: (N, G) log-probabilities of the router; None if every level was forced and it did not run.
        milliseconds: Routing time.
    """

    levels: list[int]
    log_probs: Tensor | None = None
    milliseconds: float = 0.0

    def router_probs(self, images: slice) -> tuple[tuple[float, ...], ...] | None:
        """The router's probabilities for some images; None for no images, or if it did not run."""
        if self.log_probs is None or not self.levels[images]:
            return None
        return tuple(map(tuple, self.log_probs[images].exp().tolist()))


Streamers: TypeAlias = BaseStreamer | Sequence[BaseStreamer | None] | None
"""The streamer of a single request, or one or None for each of several."""


class Predictor:
    """Answers batches of requests, routed or at forced levels, on the device of the model, which is set to `eval`."""

    def __init__(self, model: AvgLlavaForConditionalGeneration, processor: AvgLlavaProcessor) -> None:
        self.model = model.eval()
        self.processor = processor

    @property
    def granularities(self) -> list[int]:
        """The model's levels in visual tokens per crop, coarse to fine."""
        return list(self.model.config.granularities)

    def predict(
        self,
        requests: Sequence[Request],
        budget: Budget | Sequence[Budget] = Budget(),
        decoding: Decoding | Sequence[Decoding] = Decoding(),
        streamer: Streamers = None,
    ) -> list[Answer]:
        """Answers a batch; budget and decoding are one for all requests, or one for each.

        Raises:
            DataError: An image cannot be read.
            BudgetError: The images of a request do not fit into its budget.
            PromptTooLongError: A prompt exceeds `config.max_sequence_length`.
        """
        encoded = self.encode(requests)
        levels = None if encoded.features is None else self.choose(encoded, budget)
        return self.answer(encoded, levels, decoding, streamer)

    def inputs(self, requests: Sequence[Request]) -> BatchFeature:
        """Model inputs of a batch: prompts padded on the left, and the pixels of all images."""
        texts = [self.prompt_text(request) for request in requests]
        images = [[open_image(image, number) for number, image in enumerate(request.images, 1)] for request in requests]
        return self.processor(images=images, text=texts, padding=True, padding_side="left")

    @torch.inference_mode()
    def encode(self, requests: Sequence[Request]) -> EncodedRequests:
        """Tokenises the prompts and encodes all images with vision tower and projector."""
        inputs = self.inputs(requests)
        device = self.model.device
        start = now(device)
        features = None
        if "pixel_values" in inputs:
            features = self.model.encode_images(inputs["pixel_values"].to(device), inputs["image_sizes"])
        return EncodedRequests(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            features=features,
            images_per_request=tuple(len(request.images) for request in requests),
            milliseconds=now(device) - start,
        )

    @torch.inference_mode()
    def choose(self, encoded: EncodedRequests, budget: Budget | Sequence[Budget] = Budget()) -> LevelChoice:
        """Chooses the level of each image; the router runs only if at least one request is routed.

        Raises:
            BudgetError: The images of a request do not fit into its budget.
            ValueError: The batch has no images.
        """
        if encoded.features is None:
            raise ValueError("only images have a level, and none of these requests has one")
        counts = encoded.images_per_request
        budgets = [budget] * len(counts) if isinstance(budget, Budget) else list(budget)
        sizes = [encoded.features.image_sizes[images] for images in encoded.image_slices()]
        budget_of_image = [budget for budget, count in zip(budgets, counts, strict=True) for _ in range(count)]
        if all(budget.granularity is not None for budget in budget_of_image):
            return LevelChoice(select_levels(self.model.config, sizes, budgets, None))
        start = now(self.model.device)
        logits = self.model.route(encoded.features, encoded.input_ids, encoded.attention_mask).float()
        token_costs = torch.tensor([budget.token_cost for budget in budget_of_image], device=logits.device)
        values = level_values(logits, self.granularities, token_costs)
        levels = select_levels(self.model.config, sizes, budgets, values.tolist())
        return LevelChoice(levels, logits.log_softmax(-1), now(self.model.device) - start)

    @torch.inference_mode()
    def answer(
        self,
        encoded: EncodedRequests,
        granularity: int | Sequence[int] | LevelChoice | None,
        decoding: Decoding | Sequence[Decoding] = Decoding(),
        streamer: Streamers = None,
        on_answer: Callable[[int, Answer], object] = lambda row, answer: None,
    ) -> list[Answer]:
        """Answers an encoded batch at given levels; requests whose finest level is the same are generated together.

        Args:
            granularity: Visual tokens per crop: one number, one per image, or the choice of :meth:`choose`. May be None
                for text-only requests.
            decoding: One for all requests, or one for each.
            on_answer: Called with a request's row in the batch and its answer as soon as it ends.
        """
        num_requests = len(encoded.images_per_request)
        decodings = [decoding] * num_requests if isinstance(decoding, Decoding) else list(decoding)
        streamers: list[BaseStreamer | None] = list(streamer) if isinstance(streamer, Sequence) else [streamer]
        if streamer is None:
            streamers *= num_requests
        if not len(decodings) == len(streamers) == num_requests:
            raise ValueError(
                f"{num_requests} requests come with {len(decodings)} decodings and {len(streamers)} streamers; give "
                "one for each"
            )
        choice = self._as_choice(granularity, sum(encoded.images_per_request))
        rows_of_level: dict[int, list[int]] = {}
        for row, images in enumerate(encoded.image_slices()):
            rows_of_level.setdefault(max(choice.levels[images], default=0), []).append(row)
        answers: dict[int, Answer] = {}
        for rows in rows_of_level.values():
            answers |= self._answer_together(encoded, rows, choice, decodings, streamers, on_answer)
        return [answers[row] for row in range(num_requests)]

    def _answer_together(
        self,
        encoded: EncodedRequests,
        rows: Sequence[int],
        choice: LevelChoice,
        decodings: Sequence[Decoding],
        streamers: Sequence[BaseStreamer | None],
        on_answer: Callable[[int, Answer], object],
    ) -> dict[int, Answer]:
        """Generates the answers to some rows of a batch, by row."""
        start = now(self.model.device)
        group, images_of_row = encoded.of_requests(rows), encoded.image_slices()
        spliced = self.model.splice(
            group.features,
            group.input_ids,
            group.attention_mask,
            granularity=[level for row in rows for level in choice.levels[images_of_row[row]]],
            padding_side="left",
        )
        visual_tokens, prompt_tokens = spliced.num_visual_tokens.tolist(), spliced.attention_mask.sum(1).tolist()
        visual_tokens_of_row = [sum(visual_tokens[images]) for images in group.image_slices()]
        answers: dict[int, Answer] = {}

        def finish(index: int, generated: GeneratedAnswer) -> None:
            row = rows[index]
            images = images_of_row[row]
            answers[row] = Answer(
                text=generated.text,
                granularity=tuple(choice.levels[images]),
                router_probs=choice.router_probs(images),
                num_visual_tokens=visual_tokens_of_row[index],
                num_prompt_tokens=prompt_tokens[index],
                num_new_tokens=len(generated.ids),
                finish_reason=generated.finish_reason,
                timings=PhaseTimes(
                    encoded.milliseconds,
                    choice.milliseconds,
                    generated.first - start,
                    generated.ended - generated.first,
                ),
            )
            on_answer(row, answers[row])

        generate(
            self.model,
            self.processor.tokenizer,
            spliced,
            [decodings[row] for row in rows],
            [streamers[row] for row in rows],
            finish,
        )
        return answers

    def _as_choice(self, granularity: int | Sequence[int] | LevelChoice | None, num_images: int) -> LevelChoice:
        if isinstance(granularity, LevelChoice):
            return granularity
        if granularity is None and num_images:
            raise ValueError("a level is needed for each image: give one, or the result of `choose`")
        return LevelChoice(self.model.levels_of(() if granularity is None else granularity, num_images))

    def prompt_text(self, request: Request) -> str:
        """The chat template applied to a request, up to where the answer starts."""
        messages = request.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": with_placeholders(messages, len(request.images))}]
        prompt = self.processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return str(prompt)


def with_placeholders(question: str, num_images: int) -> str:
    """Puts image placeholders before a question that has none."""
    return question if IMAGE_PLACEHOLDER in question else f"{IMAGE_PLACEHOLDER}\n" * num_images + question


def without_placeholders(answer: str) -> str:
    """An answer as a message of later prompts, in which it brings no images: `<image>` becomes `< image>`."""
    return answer.replace(IMAGE_PLACEHOLDER, f"< {IMAGE_PLACEHOLDER[1:]}")


def open_image(image: ImageInput, number: int) -> Image.Image:
    """Opens an image in RGB; `number` names it in errors."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    return decode_image(image, f"image {number}") if isinstance(image, bytes) else load_image(image)


def as_images(images: ImageInput | Sequence[ImageInput] | None) -> tuple[ImageInput, ...]:
    """A tuple of one image, several or none."""
    return () if images is None else (images,) if isinstance(images, ImageInput) else tuple(images)
