"""Conversations about images that keep their key-value cache between turns.

An image's level is fixed in the turn that brings the image. The router reads the whole prompt and could choose another
level at every turn, which would change the image's tokens and invalidate the cache.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from avg_llava.inference.answers import Answer, Decoding, ImageInput, PhaseTimes, Request
from avg_llava.inference.budget import Budget, BudgetError, select_levels
from avg_llava.inference.generation import generate, now
from avg_llava.inference.predictor import Predictor, as_images, open_image, with_placeholders, without_placeholders
from avg_llava.model.modeling import ImageFeatures
from avg_llava.model.router import level_values

Key = int | tuple[int, int]
"""Identifies the content of a cached position: a token id, or an image's index and level."""


class Conversation:
    """A conversation of several turns.

    Args:
        predictor: Encodes and generates; :meth:`Pipeline.chat` passes its predictor.
        budget: The limit on visual tokens is for the whole conversation.
        decoding: Of every answer.

    Attributes:
        messages: Questions and answers, in the format of transformers' chat templates. An `<image>` that the model
            wrote is `< image>` in them, as it stands for no image.
        levels: Visual tokens per crop of each image so far.
        num_cached: Tokens of the last prompt that were in the cache.
    """

    def __init__(self, predictor: Predictor, budget: Budget = Budget(), decoding: Decoding = Decoding()) -> None:
        self.predictor = predictor
        self.budget = budget
        self.decoding = decoding
        self.messages: list[dict[str, str]] = []
        self.levels: list[int] = []
        self.num_cached = 0
        self._features: ImageFeatures | None = None
        # Without the model's configuration all layers keep all positions: a window that slid cannot be cropped.
        self._cache = DynamicCache()
        self._keys: list[Key] = []

    @torch.inference_mode()
    def ask(
        self,
        question: str,
        images: ImageInput | Sequence[ImageInput] | None = None,
        streamer: BaseStreamer | None = None,
    ) -> Answer:
        """Answers the next question, which may come with new images. An error leaves the conversation unchanged.

        Raises:
            DataError: An image cannot be read.
            BudgetError: The new images do not fit into the rest of the budget.
            PromptTooLongError: The conversation exceeds `config.max_sequence_length`.
        """
        predictor, model = self.predictor, self.predictor.model
        given = [open_image(image, number) for number, image in enumerate(as_images(images), 1)]
        messages = [*self.messages, {"role": "user", "content": with_placeholders(question, len(given))}]
        text = predictor.prompt_text(Request(messages))
        config, tokenizer = model.config, predictor.processor.tokenizer
        ids = predictor.processor.tokenize(text).input_ids
        input_ids = torch.tensor([ids], device=model.device)
        mask = torch.ones_like(input_ids)

        start = now(model.device)
        features = self._with_images(given)
        encoded = now(model.device)
        levels, probabilities = self._with_levels(features, len(given), input_ids)
        routed = now(model.device)
        spliced = model.splice(features, input_ids, mask, granularity=levels)
        keys = _position_keys(ids, config.image_token_id, spliced.num_visual_tokens.tolist(), levels)
        self._crop_cache(keys)
        (generated,) = generate(model, tokenizer, spliced, [self.decoding], [streamer], cache=self._cache)

        self._keys = [*keys, *generated.ids][: self._cache.get_seq_length()]
        self._features, self.levels = features, levels
        self.messages = [*messages, {"role": "assistant", "content": without_placeholders(generated.text)}]
        return Answer(
            text=generated.text,
            granularity=tuple(levels[len(levels) - len(given) :]),
            router_probs=probabilities,
            num_visual_tokens=int(spliced.num_visual_tokens.sum()),
            num_prompt_tokens=len(keys),
            num_new_tokens=len(generated.ids),
            finish_reason=generated.finish_reason,
            timings=PhaseTimes(
                encoded - start,
                routed - encoded if probabilities else 0.0,
                generated.first - routed,
                generated.ended - generated.first,
            ),
        )

    def _with_images(self, images: Sequence[Any]) -> ImageFeatures | None:
        """Encodes the new images and appends them to the features of the earlier ones."""
        if not images:
            return self._features
        model = self.predictor.model
        inputs = self.predictor.processor.image_processor(list(images), return_tensors="pt")
        new = model.encode_images(inputs["pixel_values"].to(model.device), inputs["image_sizes"])
        if self._features is None:
            return new
        return ImageFeatures(
            torch.cat([self._features.crops, new.crops]),
            [*self._features.num_crops, *new.num_crops],
            [*self._features.image_sizes, *new.image_sizes],
        )

    def _with_levels(
        self, features: ImageFeatures | None, num_new: int, input_ids: torch.Tensor
    ) -> tuple[list[int], tuple[tuple[float, ...], ...] | None]:
        """Levels of all images, and the router's probabilities for the new ones (None if it did not run)."""
        if features is None or not num_new:
            return self.levels, None
        predictor, budget = self.predictor, self.budget
        values = probabilities = None
        if budget.granularity is None:
            logits = predictor.model.route(features, input_ids, torch.ones_like(input_ids))[-num_new:].float()
            values = level_values(logits, predictor.granularities, budget.token_cost).tolist()
            probabilities = tuple(map(tuple, logits.softmax(-1).tolist()))
        if budget.max_visual_tokens is not None:
            used = sum(isinstance(key, tuple) for key in self._keys)
            if used >= budget.max_visual_tokens:
                raise BudgetError(
                    f"max_visual_tokens {budget.max_visual_tokens} is used up by the {len(self.levels)} images of this "
                    "conversation; raise it, or start a new one"
                )
            budget = replace(budget, max_visual_tokens=budget.max_visual_tokens - used)
        sizes = features.image_sizes[-num_new:]
        return [*self.levels, *select_levels(predictor.model.config, [sizes], [budget], values)], probabilities

    def _crop_cache(self, keys: Sequence[Key]) -> None:
        """Crops the cache to the common prefix with the new prompt, whose last token is always computed."""
        pairs = zip(self._keys, keys[:-1], strict=False)
        num_common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        self._cache.crop(num_common - len(self._keys))
        self._keys, self.num_cached = self._keys[:num_common], num_common


def _position_keys(ids: Sequence[int], image_token_id: int, counts: Sequence[int], levels: Sequence[int]) -> list[Key]:
    """The key of each position of a prompt, in which each placeholder is expanded to `counts` visual tokens."""
    images = enumerate(zip(levels, counts, strict=True))
    keys: list[Key] = []
    for token in ids:
        if token == image_token_id:
            index, (level, count) = next(images)
            keys += [(index, level)] * count
        else:
            keys.append(token)
    return keys
