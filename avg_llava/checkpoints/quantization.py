"""8-bit and 4-bit weights with bitsandbytes, for inference and under trained adapters.

Only the linear layers of the language model's blocks are quantised: nine tenths of the weights of a 7B model. Vision
tower, projector, embeddings and router keep their precision, so that routing is exactly as without quantisation; so
does the head, whose errors would change the answer's tokens directly.
"""

import importlib
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from avg_llava.model.language import language_parts

Quantization = Literal["8bit", "4bit"]
NOT_QUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "model.router", "lm_head"]
BLOCK_SIZE = 64  # weights that share one float32 scale in NF4
BYTES_PER_WEIGHT = 0.5 + 4 / BLOCK_SIZE


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
    check_available(quantization, target)
    # bitsandbytes would warn for every layer and token that 8-bit layers multiply in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=NOT_QUANTIZED,
    )
    return {"quantization_config": config, "device_map": {"": target}}


def check_available(quantization: Quantization, device: torch.device) -> None:
    """Raises ValueError if bitsandbytes is not installed, or does not run on the device."""
    try:
        importlib.import_module("accelerate")
        supported = importlib.import_module("bitsandbytes").supported_torch_devices
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{quantization} weights need bitsandbytes and accelerate ({error}): pip install -e '.[quant]'"
        ) from error
    if device.type not in supported:
        known = ", ".join(sorted(supported))
        raise ValueError(f"bitsandbytes does not run on {device.type}, only on {known}; load the weights whole")


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Sets the data type in which 4-bit layers multiply; it is known once the other weights are loaded."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = dtype


def freeze_in_4bit(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the linear layers of the language model's blocks by frozen 4-bit ones, for training adapters on them.

    The weights are those of `load_model(..., quantization="4bit")`. They are no part of the state dict: a run that
    continues reads them from its start again.

    Args:
        model: A whole model, whose layers are freed one by one.
        dtype: Data type in which the layers multiply.
        device: Of the 4-bit weights; the rest of the model stays where it is.

    Raises:
        ValueError: A layer's rows are no whole number of blocks, which bitsandbytes rounds wrongly on a CPU.
    """
    from bitsandbytes.nn import Params4bit

    for name, layer in list(quantizable_layers(model)):
        if layer.in_features % BLOCK_SIZE:
            raise ValueError(
                f"{name} has {layer.in_features} inputs; 4-bit weights need a multiple of {BLOCK_SIZE}: load them whole"
            )
        frozen = _frozen_layer()(
            layer.in_features, layer.out_features, layer.bias is not None, dtype, False, "nf4", device="meta"
        )
        frozen.weight = Params4bit(
            layer.weight.data, compress_statistics=False, blocksize=BLOCK_SIZE, quant_type="nf4", module=frozen
        ).to(device)
        if layer.bias is not None:
            frozen.bias = nn.Parameter(layer.bias.data.to(device), requires_grad=False)
        model.set_submodule(name, frozen)


def quantizable_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Names and linear layers of the language model's blocks, without adapters."""
    blocks = f"model.language_model.{language_parts(model.config.text_config).layers}."
    for name, layer in model.named_modules():
        if name.startswith(blocks) and isinstance(layer, nn.Linear) and ".lora_" not in name:
            yield name, layer


@cache
def _frozen_layer() -> Any:
    from bitsandbytes.nn import Linear4bit

    class FrozenLinear4bit(Linear4bit):
        """A 4-bit layer whose weights are neither saved with the model nor loaded."""

        def _save_to_state_dict(self, destination: Mapping[str, Any], prefix: str, keep_vars: bool) -> None:
            pass

        def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
            pass

    return FrozenLinear4bit
