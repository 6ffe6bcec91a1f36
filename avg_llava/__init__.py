"""AVG-LLaVA: a large multimodal model that picks its visual granularity from the image and the instruction.

Public names are imported on first use (PEP 562): `import avg_llava` loads neither torch nor transformers. Each module
that defines a class registers it with transformers' `Auto*` classes. Code that loads AVG-LLaVA folders through
`AutoModelForImageTextToText` and `AutoProcessor` therefore starts with
`from avg_llava import AvgLlavaForConditionalGeneration, AvgLlavaProcessor`.
"""

import importlib
import logging
import threading
from typing import TYPE_CHECKING, Any

# On import, by peft and by transformers' Trainer, bitsandbytes warns that it lacks an optional CPU kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from avg_llava.checkpoints.loading import build_from_backbones, load, load_model
    from avg_llava.checkpoints.weight_files import CheckpointError
    from avg_llava.inference.answers import Answer, Decoding, Request
    from avg_llava.inference.budget import Budget, BudgetError
    from avg_llava.inference.conversation import Conversation
    from avg_llava.inference.pipeline import Pipeline
    from avg_llava.model.configuration import AvgLlavaConfig, RouterConfig
    from avg_llava.model.modeling import AvgLlavaForConditionalGeneration, AvgLlavaOutput
    from avg_llava.model.processing import AvgLlavaProcessor

    __version__: str

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
    "Pipeline",
    "Request",
    "RouterConfig",
    "build_from_backbones",
    "load",
    "load_model",
]

_MODULES = {
    "checkpoints.loading": ("build_from_backbones", "load", "load_model"),
    "checkpoints.weight_files": ("CheckpointError",),
    "inference.answers": ("Answer", "Decoding", "Request"),
    "inference.budget": ("Budget", "BudgetError"),
    "inference.conversation": ("Conversation",),
    "inference.pipeline": ("Pipeline",),
    "model.configuration": ("AvgLlavaConfig", "RouterConfig"),
    "model.modeling": ("AvgLlavaForConditionalGeneration", "AvgLlavaOutput"),
    "model.processing": ("AvgLlavaProcessor",),
}
_IMPORTING = threading.RLock()
"""Held while a name is imported: transformers' own lazy imports fail in several threads at once."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value = version("avg-llava")
    elif name in __all__:
        (module,) = (module for module, names in _MODULES.items() if name in names)
        with _IMPORTING:
            value = getattr(importlib.import_module(f"avg_llava.{module}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
