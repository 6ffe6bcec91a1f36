"""From a chat request to what the model is asked, or an error that says what is wrong with it.

All that can be wrong with a request is found here, before it waits for the model: what is in a batch can be answered.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

from PIL import Image, UnidentifiedImageError

from avg_llava.inference.answers import Decoding, Request
from avg_llava.inference.budget import Budget, BudgetError
from avg_llava.inference.predictor import Predictor
from avg_llava.model.images import DataError, decode_image
from avg_llava.model.processing import IMAGE_PLACEHOLDER, tokenize_with_images
from avg_llava.serving.images import RemoteImageError, fetch
from avg_llava.serving.limits import Limits
from avg_llava.serving.protocol import ApiError, ChatRequest, ImagePart

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats of images from strangers. Pillow reads more, some of them by starting other programs."""
FETCH_SECONDS = 15.0
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[^,;]+)*;base64,")


@dataclass(frozen=True)
class Prepared:
    """What the model is asked."""

    request: Request
    budget: Budget
    decoding: Decoding


def invalid(message: str) -> ApiError:
    """The error of a request that cannot be used."""
    return ApiError(400, "invalid_request", message)


class Preparation:
    """Prepares requests for a model.

    Args:
        predictor: Answers.
        limits: The server's limits.
    """

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self._predictor, self._limits = predictor, limits
        vocabulary = predictor.processor.tokenizer.get_vocab()
        self._max_characters = predictor.model.config.max_sequence_length * max(map(len, vocabulary))

    def prepare(self, chat: ChatRequest) -> Prepared:
        """Reads and checks all of a request; images on remote hosts are fetched.

        Raises:
            ApiError: The request cannot be answered.
        """
        decoding = self._decoding(chat)
        try:
            budget = Budget(chat.granularity, chat.token_cost or 0.0, chat.max_visual_tokens)
        except BudgetError as error:
            raise invalid(str(error)) from error
        messages, urls = self._messages(chat)
        images = self._images(urls)
        request = Request(messages, tuple(images))
        return Prepared(request, self._fit(request, images, budget), decoding)

    def _decoding(self, chat: ChatRequest) -> Decoding:
        longest = self._limits.max_tokens
        given = [number for number in (chat.max_tokens, chat.max_completion_tokens) if number is not None]
        if len(given) == 2:
            raise invalid("max_tokens and max_completion_tokens are the same: give one of the two")
        if given and given[0] > longest:
            raise invalid(f"max_tokens {given[0]} is above this server's limit of {longest}")
        if chat.stream_options is not None and not chat.stream:
            raise invalid("stream_options is given, but stream is not true")
        stops = (chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ())
        return Decoding(
            max_new_tokens=given[0] if given else longest,
            temperature=chat.temperature or 0.0,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            stop=stops,
            seed=chat.seed,
        )

    def _messages(self, chat: ChatRequest) -> tuple[list[dict[str, Any]], list[str]]:
        """The conversation as chat templates take it, and the addresses of its images in their order."""
        messages: list[dict[str, Any]] = []
        urls: list[str] = []
        num_characters = 0
        for place, message in enumerate(chat.messages):
            system = message.role in ("system", "developer")
            if system and place:
                raise invalid("a system message can only be the first")
            parts: list[dict[str, str]] = []
            for part in [message.content] if isinstance(message.content, str) else message.content:
                if isinstance(part, ImagePart):
                    urls.append(part.image_url.url)
                    parts.append({"type": "image"})
                    continue
                text = part if isinstance(part, str) else part.text
                if IMAGE_PLACEHOLDER in text:
                    raise invalid(f"text must not hold {IMAGE_PLACEHOLDER}, which stands for an image")
                num_characters += len(text)
                parts.append({"type": "text", "text": text})
            # Only the user's turns are lists to every template.
            content = parts if message.role == "user" else "".join(part["text"] for part in parts)
            messages.append({"role": "system" if system else message.role, "content": content})
        if messages[-1]["role"] != "user":
            raise invalid("the last message must be the user's")
        if num_characters > self._max_characters:
            raise ApiError(
                400, "context_length_exceeded", f"{num_characters} characters are more than the model can read"
            )
        return messages, urls

    def _images(self, urls: Sequence[str]) -> list[Image.Image]:
        limits = self._limits
        if len(urls) > limits.max_images:
            raise invalid(f"{len(urls)} images are more than this server's limit of {limits.max_images}")
        contents = []
        num_pixels = 0
        for place, url in enumerate(urls, 1):
            try:
                content = self._content(url)
                with Image.open(BytesIO(content), formats=FORMATS) as image:
                    num_pixels += image.width * image.height
            except UnidentifiedImageError as error:
                known = ", ".join(FORMATS)
                raise invalid(f"image {place} is damaged, or of none of the formats {known}") from error
            except (RemoteImageError, DataError) as error:
                raise invalid(f"image {place} {error}") from error
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise invalid(f"image {place} cannot be read ({error})") from error
            contents.append(content)
        if num_pixels > limits.max_pixels:
            raise ApiError(
                400,
                "image_too_large",
                f"the images have {num_pixels} pixels together, above this server's limit of {limits.max_pixels}; make "
                "them smaller",
            )
        try:
            return [decode_image(content, f"image {place}") for place, content in enumerate(contents, 1)]
        except DataError as error:
            raise invalid(str(error)) from error

    def _content(self, url: str) -> bytes:
        if url.startswith(("http://", "https://")):
            if not self._limits.remote_images:
                raise RemoteImageError("is on a remote host, from which this server takes none: send a data URL")
            return fetch(url, self._limits.max_body_mib * 2**20, FETCH_SECONDS)
        head = _DATA_URL.match(url)
        if head is None:
            raise DataError("has an address that is no data URL: data:image/png;base64,...")
        try:
            return base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"is no valid base64 ({error})") from error

    def _fit(self, request: Request, images: Sequence[Image.Image], budget: Budget) -> Budget:
        """The budget, with what the model can read as a further limit on visual tokens.

        Raises:
            ApiError: The images do not fit into the budget, or the prompt is longer than the model can read.
        """
        predictor = self._predictor
        config, tokenizer = predictor.model.config, predictor.processor.tokenizer
        ids = tokenize_with_images(predictor.prompt_text(request), tokenizer, config.image_token_id).input_ids
        num_text, longest = len(ids) - len(images), config.max_sequence_length
        sizes = [(image.height, image.width) for image in images]
        worth = [[0.0] * len(predictor.granularities)] * len(sizes)
        try:
            predictor.levels_within([sizes], [budget], worth)  # at these values, whichever levels fit
        except ValueError as error:
            raise invalid(str(error)) from error
        room = longest - num_text
        too_long = ApiError(
            400,
            "context_length_exceeded",
            f"the prompt has {num_text} tokens of text and {len(images)} images, more than the {longest} tokens that "
            "the model can read; shorten it, or use fewer images or a coarser granularity",
        )
        if room < 0 or (images and room == 0):
            raise too_long
        if not images:
            return budget
        fitting = replace(budget, max_visual_tokens=min(room, budget.max_visual_tokens or room))
        try:
            predictor.levels_within([sizes], [fitting], worth)
        except BudgetError as error:
            raise too_long from error
        return fitting


__all__ = ["FORMATS", "Preparation", "Prepared", "invalid"]
