"""8-bit and 4-bit weights with bitsandbytes.

Only the linear layers of the language model's blocks are quantised: nine tenths of the weights of a 7B model. Vision
tower, projector, embeddings and router keep their precision, so that routing is exactly as without quantisation; so
does the head, whose errors would change the answer's tokens directly.
"""

import importlib
import logging
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

Quantization = Literal["8bit", "4bit"]
NOT_QUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "model.router", "lm_head"]


def quantization_arguments(quantization: Quantization, device: torch.device | str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise weights while they are read.

    Args:
        quantization: "8bit" (LLM.int8, outlier columns in half precision) or "4bit" (NF4).
        device: None is the CPU.

    Raises:
        ValueError: bitsandbytes is not installed, or does not run on the device.
    """
    if quantization not in ("8bit", "4bit"):
        raise ValueError(f"quantization is '8bit' or '4bit', not {quantization!r}")
    target = torch.device(device or "cpu")
    try:
        importlib.import_module("accelerate")
        supported = importlib.import_module("bitsandbytes").supported_torch_devices
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{quantization} weights need bitsandbytes and accelerate ({error}): pip install -e '.[quant]'"
        ) from error
    if target.type not in supported:
        known = ", ".join(sorted(supported))
        raise ValueError(f"bitsandbytes does not run on {target.type}, only on {known}; load the weights whole")
    # bitsandbytes would warn for every layer and token that 8-bit layers multiply in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=NOT_QUANTIZED,
    )
    return {"quantization_config": config, "device_map": {"": target}}


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Sets the data type in which 4-bit layers multiply; it is known once the other weights are loaded."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = dtype
