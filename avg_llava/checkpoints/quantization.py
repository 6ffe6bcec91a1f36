"""Weights of 8 or 4 bits, through bitsandbytes.

Only the linear layers of the language model's blocks are quantised, nine tenths of the weights of a 7B model. Vision
tower, projector, embeddings and router stay whole, so that levels are chosen exactly as without quantisation; the head
too, whose errors would go into the answer's tokens directly.
"""

import importlib
import logging
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

Quantization = Literal["8bit", "4bit"]
WHOLE = ["model.vision_tower", "model.multi_modal_projector", "model.router", "lm_head"]


def quantization_arguments(quantization: Quantization, device: torch.device | str | None) -> dict[str, Any]:
    """What `from_pretrained` must be told to quantise weights while it reads them.

    Args:
        quantization: "8bit" (LLM.int8: columns of large values stay whole) or "4bit" (NF4).
        device: Where the model will be; None is the CPU.

    Raises:
        ValueError: bitsandbytes is not installed, or does not run on the device.
    """
    if quantization not in ("8bit", "4bit"):
        raise ValueError(f"quantization is '8bit' or '4bit', not {quantization!r}")
    place = torch.device(device or "cpu")
    try:
        importlib.import_module("accelerate")
        supported = importlib.import_module("bitsandbytes").supported_torch_devices
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{quantization} weights need bitsandbytes and accelerate ({error}): pip install -e '.[quant]'"
        ) from error
    if place.type not in supported:
        known = ", ".join(sorted(supported))
        raise ValueError(f"bitsandbytes does not run on {place.type}, only on {known}; load the weights whole")
    # That 8-bit layers multiply in float16 would be told for each of them, at every token.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=WHOLE,
    )
    return {"quantization_config": config, "device_map": {"": place}}


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Lets 4-bit layers multiply in the data type of the other weights, which is known once those are loaded."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = dtype


__all__ = ["Quantization", "compute_in", "quantization_arguments"]
