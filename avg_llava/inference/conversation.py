"""A conversation about images, in which nothing that the language model has read is computed again.

Image tokens depend on their level, and the router, which reads the whole prompt, could choose another one at every
turn: so the level of an image is fixed in the turn that brings it.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from avg_llava.inference.answers import Answer, Decoding, ImageInput, PhaseTimes, Request
from avg_llava.inference.budget import Budget, BudgetError
from avg_llava.inference.generation import now, write
from avg_llava.inference.predictor import Predictor, as_images, open_image, with_placeholders
from avg_llava.model.outputs import ImageFeatures
from avg_llava.model.processing import tokenize_with_images
from avg_llava.model.router import level_values

Key = int | tuple[int, int]
"""What a position of the prompt depends on: a token's id, or an image's number and its level."""


class Conversation:
    """Turns of one conversation.

    Args:
        predictor: Answers; see :meth:`Pipeline.chat`.
        budget: How the levels of images are found; the limit on visual tokens holds for the whole conversation.
        decoding: How answers are written.

    Attributes:
        messages: What was said, in the format of transformers' chat templates.
        levels: Visual tokens per crop of each image so far.
        num_cached: Tokens of the last prompt that were not computed anew.
    """

    def __init__(self, predictor: Predictor, budget: Budget = Budget(), decoding: Decoding = Decoding()) -> None:
        self.predictor = predictor
        self.budget = budget
        self.decoding = decoding
        self.messages: list[dict[str, str]] = []
        self.levels: list[int] = []
        self.num_cached = 0
        self._features: ImageFeatures | None = None
        self._cache = DynamicCache(config=predictor.model.config.text_config)
        self._keys: list[Key] = []

    @torch.inference_mode()
    def ask(
        self,
        question: str,
        images: ImageInput | Sequence[ImageInput] | None = None,
        streamer: BaseStreamer | None = None,
    ) -> Answer:
        """The next turn. After an error the conversation is as it was before.

        Args:
            question: What the user says.
            images: What the user shows with it.
            streamer: Takes the answer's tokens as they come.

        Raises:
            DataError: An image cannot be read.
            BudgetError: The new images do not fit into the budget.
            PromptTooLongError: The conversation is longer than the model can read.
        """
        predictor, model = self.predictor, self.predictor.model
        given = [open_image(image, place) for place, image in enumerate(as_images(images), 1)]
        messages = [*self.messages, {"role": "user", "content": with_placeholders(question, len(given))}]
        text = predictor.prompt_text(Request(messages))
        config, tokenizer = model.config, predictor.processor.tokenizer
        ids = tokenize_with_images(text, tokenizer, config.image_token_id).input_ids
        input_ids = torch.tensor([ids], device=model.device)
        mask = torch.ones_like(input_ids)

        began = now(model.device)
        features = self._with_images(given)
        encoded = now(model.device)
        levels, probabilities = self._with_levels(features, len(given), input_ids)
        routed = now(model.device)
        spliced = model.splice(features, input_ids, mask, granularity=levels)
        keys = _keys(ids, config.image_token_id, spliced.num_visual_tokens.tolist(), levels)
        self._forget_after(keys)
        (written,) = write(model, tokenizer, spliced, [self.decoding], [streamer], cache=self._cache)

        self._keys = [*keys, *written.ids][: self._cache.get_seq_length()]
        self._features, self.levels = features, levels
        self.messages = [*messages, {"role": "assistant", "content": written.text}]
        return Answer(
            text=written.text,
            granularity=tuple(levels[len(levels) - len(given) :]),
            router_probs=probabilities,
            num_visual_tokens=int(spliced.num_visual_tokens.sum()),
            num_prompt_tokens=len(keys),
            num_new_tokens=len(written.ids),
            finish_reason=written.finish_reason,
            timings=PhaseTimes(
                encoded - began,
                routed - encoded if probabilities else 0.0,
                written.first - routed,
                written.ended - written.first,
            ),
        )

    def _with_images(self, images: Sequence[Any]) -> ImageFeatures | None:
        """The features of all images, of which only the new ones are encoded."""
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
        """The levels of all images, and the router's probabilities for the new ones where it was asked."""
        if features is None or not num_new:
            return self.levels, None
        predictor, budget, probabilities = self.predictor, self.budget, None
        values = [[0.0] * len(predictor.granularities)] * num_new
        if budget.granularity is None:
            logits = predictor.model.route(features, input_ids, torch.ones_like(input_ids))[-num_new:].float()
            values = level_values(logits, predictor.granularities, budget.token_cost).tolist()
            probabilities = tuple(map(tuple, logits.softmax(-1).tolist()))
        if budget.max_visual_tokens is not None:
            taken = sum(isinstance(key, tuple) for key in self._keys)
            if taken >= budget.max_visual_tokens:
                raise BudgetError(
                    f"max_visual_tokens {budget.max_visual_tokens} is used up by the {len(self.levels)} images of this "
                    "conversation; raise it, or begin anew"
                )
            budget = replace(budget, max_visual_tokens=budget.max_visual_tokens - taken)
        sizes = features.image_sizes[-num_new:]
        return [*self.levels, *predictor.levels_within([sizes], [budget], values)], probabilities

    def _forget_after(self, keys: Sequence[Key]) -> None:
        """Leave in the cache what the new prompt begins with; its last token at least is computed."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._keys, keys[:-1], strict=False)))
        self._cache.crop(same - len(self._keys))
        self._keys, self.num_cached = self._keys[:same], same


def _keys(ids: Sequence[int], image_token_id: int, counts: Sequence[int], levels: Sequence[int]) -> list[Key]:
    """What each position of a prompt depends on, its visual tokens in their places."""
    keys: list[Key] = []
    number = 0
    for token in ids:
        if token == image_token_id:
            keys += [(number, levels[number])] * counts[number]
            number += 1
        else:
            keys.append(token)
    return keys


__all__ = ["Conversation"]
