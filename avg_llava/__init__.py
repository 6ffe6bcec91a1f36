"""AVG-LLaVA: a large multimodal model that picks its visual granularity from the image and the instruction."""

from transformers import AutoConfig, AutoModelForImageTextToText

from avg_llava.checkpoints.loading import CheckpointError, build_from_backbones, load, load_model
from avg_llava.inference.answers import Answer, Decoding, Request
from avg_llava.inference.budget import Budget, BudgetError
from avg_llava.inference.conversation import Conversation
from avg_llava.model.configuration import AvgLlavaConfig, RouterConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.outputs import AvgLlavaOutput
from avg_llava.model.processing import AvgLlavaProcessor, register

AutoConfig.register(AvgLlavaConfig.model_type, AvgLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(AvgLlavaConfig, AvgLlavaForConditionalGeneration, exist_ok=True)
register()

__all__ = [
    "Answer",
    "AvgLlavaConfig",
    "AvgLlavaForConditionalGeneration",
    "AvgLlavaOutput",
    "AvgLlavaProcessor",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "Conversation",
    "Decoding",
    "Request",
    "RouterConfig",
    "build_from_backbones",
    "load",
    "load_model",
]
