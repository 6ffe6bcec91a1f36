"""Validates a chat request and converts it to a prompt, a budget and decoding options for the model.

Every error that a request can cause is raised here, before the request is queued: a batch holds valid requests only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from avg_llava.inference.answers import Decoding, Request
from avg_llava.inference.budget import Budget, BudgetError, select_levels
from avg_llava.inference.predictor import Predictor, without_placeholders
from avg_llava.model.templates import IMAGE_PLACEHOLDER
from avg_llava.serving.images import read_images
from avg_llava.serving.limits import Limits
from avg_llava.serving.protocol import ApiError, ChatRequest, ImagePart, invalid_request


@dataclass(frozen=True)
class PreparedRequest:
    """A validated chat request, as the predictor takes it."""

    request: Request
    budget: Budget
    decoding: Decoding


class PromptBuilder:
    """Prepares chat requests for the predictor that will answer them."""

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self._predictor, self._limits = predictor, limits
        vocabulary = predictor.processor.tokenizer.get_vocab()
        self._max_characters = predictor.model.config.max_sequence_length * max(map(len, vocabulary))

    def build(self, chat: ChatRequest) -> PreparedRequest:
        """Validates a chat request and reads its images; remote images are downloaded.

        Raises:
            ApiError: The request is invalid.
        """
        decoding = self._decoding(chat)
        try:
            budget = Budget(chat.granularity, chat.token_cost or 0.0, chat.max_visual_tokens)
        except BudgetError as error:
            raise invalid_request(str(error)) from error
        messages, urls = self._messages(chat)
        images = read_images(urls, self._limits)
        request = Request(messages, tuple(images))
        return PreparedRequest(request, self._fit(request, images, budget), decoding)

    def _decoding(self, chat: ChatRequest) -> Decoding:
        limit = self._limits.max_tokens
        given = [number for number in (chat.max_tokens, chat.max_completion_tokens) if number is not None]
        if len(given) == 2:
            raise invalid_request("max_tokens and max_completion_tokens are the same option: give only one of the two")
        if given and given[0] > limit:
            raise invalid_request(f"max_tokens {given[0]} is above this server's limit of {limit}")
        if chat.stream_options is not None and not chat.stream:
            raise invalid_request("stream_options is given, but stream is not true")
        stops = (chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ())
        return Decoding(
            max_new_tokens=given[0] if given else limit,
            temperature=chat.temperature or 0.0,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            stop=stops,
            seed=chat.seed,
        )

    def _messages(self, chat: ChatRequest) -> tuple[list[dict[str, Any]], list[str]]:
        """Returns the messages in the format of chat templates, and the image URLs in order of appearance."""
        messages: list[dict[str, Any]] = []
        urls: list[str] = []
        num_characters = 0
        for index, message in enumerate(chat.messages):
            is_system = message.role in ("system", "developer")
            if is_system and index:
                raise invalid_request("only the first message can be a system message")
            parts: list[dict[str, str]] = []
            for part in [message.content] if isinstance(message.content, str) else message.content:
                if isinstance(part, ImagePart):
                    urls.append(part.image_url.url)
                    parts.append({"type": "image"})
                    continue
                text = part if isinstance(part, str) else part.text
                num_characters += len(text)
                parts.append({"type": "text", "text": text})
            # Not every template accepts lists of parts in system and assistant messages.
            content = parts if message.role == "user" else "".join(part["text"] for part in parts)
            if message.role == "assistant":
                content = without_placeholders(str(content))
            messages.append({"role": "system" if is_system else message.role, "content": content})
        if messages[-1]["role"] != "user":
            raise invalid_request("the last message must be a user message")
        if num_characters > self._max_characters:
            raise _context_length_exceeded(f"{num_characters} characters exceed the model's context length")
        return messages, urls

    def _fit(self, request: Request, images: Sequence[Image.Image], budget: Budget) -> Budget:
        """Lowers the budget's limit on visual tokens to what the model's context length leaves for them.

        Raises:
            ApiError: The images do not fit into the budget, or the prompt into the context.
        """
        predictor = self._predictor
        config, processor = predictor.model.config, predictor.processor
        try:
            prompt = predictor.prompt_text(request)
            processor.refuse_markers(request.prompt, in_answers=True)  # the client sends them
            ids = processor.tokenize(prompt).input_ids
        except ValueError as error:  # a role or a text that the chat template or the model refuses
            raise invalid_request(str(error)) from error
        if prompt.count(IMAGE_PLACEHOLDER) != len(images):
            raise invalid_request(f"text must not contain {IMAGE_PLACEHOLDER}, the placeholder of images")
        num_text = len(ids) - len(images)
        sizes = [(image.height, image.width) for image in images]
        try:
            select_levels(config, [sizes], [budget], None)
        except ValueError as error:
            raise invalid_request(str(error)) from error
        available = config.max_sequence_length - num_text
        too_long = _context_length_exceeded(
            f"the prompt has {num_text} text tokens and {len(images)} images, which exceeds the context length of "
            f"{config.max_sequence_length} tokens; shorten it, or use fewer images or a coarser granularity"
        )
        if available < 0 or (images and available == 0):
            raise too_long
        if not images:
            return budget
        fitting = replace(budget, max_visual_tokens=min(available, budget.max_visual_tokens or available))
        try:
            select_levels(config, [sizes], [fitting], None)
        except BudgetError as error:
            raise too_long from error
        return fitting


def _context_length_exceeded(message: str) -> ApiError:
    return ApiError(400, "context_length_exceeded", message)
