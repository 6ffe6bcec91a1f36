"""A model and its processor as one object that answers questions about images. Start here to read `inference/`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.generation.streamers import BaseStreamer

from avg_llava.checkpoints.loading import load
from avg_llava.inference.answers import Answer, Decoding, ImageInput, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.conversation import Conversation
from avg_llava.inference.predictor import Predictor, as_images
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.processing import AvgLlavaProcessor


class Pipeline:
    """Answers single questions, batches and conversations, on the device of the model, which is set to `eval`.

    Attributes:
        predictor: The steps beneath: encode, choose levels, answer.
    """

    def __init__(self, model: AvgLlavaForConditionalGeneration, processor: AvgLlavaProcessor) -> None:
        self.predictor = Predictor(model, processor)

    @classmethod
    def load(cls, path: str | Path, **kwargs: Any) -> "Pipeline":
        """Loads a checkpoint folder or hub id; arguments as for :func:`avg_llava.load_model`."""
        return cls(*load(path, **kwargs))

    @property
    def model(self) -> AvgLlavaForConditionalGeneration:
        """The model."""
        return self.predictor.model

    @property
    def processor(self) -> AvgLlavaProcessor:
        """The model's processor."""
        return self.predictor.processor

    def ask(
        self,
        images: ImageInput | Sequence[ImageInput] | None,
        question: str,
        granularity: int | None = None,
        token_cost: float = 0.0,
        max_visual_tokens: int | None = None,
        streamer: BaseStreamer | None = None,
        **decoding: Any,
    ) -> Answer:
        """Answers one question.

        Args:
            images: One image (Pillow image, path, or the bytes of a file), several, or None.
            question: May hold one `<image>` per image to say where they go; without, they go before the text.
            granularity: Visual tokens per crop; None routes. This and the next two are fields of :class:`Budget`.
            token_cost: Price in nats per doubling of visual tokens.
            max_visual_tokens: Limit on the visual tokens of all images together.
            streamer: Receives the answer's tokens as they are generated.
            **decoding: Fields of :class:`Decoding`.

        Raises:
            DataError: An image cannot be read.
            BudgetError: The budget is invalid, or the images do not fit into it.
        """
        budget = Budget(granularity, token_cost, max_visual_tokens)
        return self.predictor.predict([Request(question, as_images(images))], budget, Decoding(**decoding), streamer)[0]

    def generate_batch(
        self,
        requests: Sequence[Request],
        budget: Budget | Sequence[Budget] = Budget(),
        decoding: Decoding | Sequence[Decoding] = Decoding(),
    ) -> list[Answer]:
        """Answers several requests together, with one budget and decoding for all or one for each."""
        return self.predictor.predict(requests, budget, decoding)

    def chat(self, budget: Budget = Budget(), decoding: Decoding = Decoding()) -> Conversation:
        """Starts a conversation whose turns reuse the key-value cache."""
        return Conversation(self.predictor, budget, decoding)
