"""Low-rank adapters (LoRA) through peft: in the language model, and if asked for in the vision tower.

Projector, newline and router are no targets: the stage trains or freezes them whole. peft wraps every adapted layer, so
`...q_proj.weight` becomes `...q_proj.base_layer.weight` beside `...q_proj.lora_A.default.weight` and `lora_B`. Outside
of the training process these names do not exist: every checkpoint and every result is a whole model, the adapters
merged into its weights, that all of this package takes like any other. The adapters themselves are kept beside it, in
`adapter/`, in peft's own format: from them, and from the stage's start, a run continues without a rounding.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from avg_llava.common.settings import ConfigError
from avg_llava.training.config import LoraSettings
from avg_llava.training.stages import Part, is_adapter, part_of

ADAPTER_FOLDER = "adapter"
_WEIGHTS_NAME = "adapter_model.safetensors"
_BASE, _OWN, _PEFT_PREFIX = ".base_layer.", ".default.", "base_model.model."


def add_adapters(model: PreTrainedModel, settings: LoraSettings, seed: int) -> None:
    """Wrap the linear layers that the settings name; the model computes what it did before.

    Args:
        model: the whole model.
        settings: which layers, and the adapters' shape.
        seed: of the adapters' first values, the same however the model was loaded.

    Raises:
        ConfigError: the language model has no such layer.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes a second to import

    targets = [_pattern("model.language_model", _linear_layers(model, "llm"), settings.target_modules)]
    if settings.vision:
        targets.append(_pattern("model.vision_tower", _linear_layers(model, "vision"), None))
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="|".join(targets),
    )
    set_seed(seed)
    inject_adapter_in_model(config, model)


def _linear_layers(model: nn.Module, part: Part) -> set[str]:
    """Last parts of the names of a part's linear layers, the language model's head apart."""
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("lm_head") and part_of(f"{name}.weight") == part
    }


def _pattern(prefix: str, known: set[str], wanted: tuple[str, ...] | None) -> str:
    """A regular expression for the full names of the wanted layers; None wants all."""
    unknown = sorted(set(wanted or ()) - known)
    if unknown:
        raise ConfigError(
            f"lora.target_modules names {', '.join(unknown)}; the language model's linear layers are "
            f"{', '.join(sorted(known))}"
        )
    return rf"{re.escape(prefix)}\..*\.(?:{'|'.join(sorted(wanted or known))})"


class AdapterShape(NamedTuple):
    """What the adapters of a part cost a token.

    Attributes:
        parameters: of all adapters.
        inputs: features that enter the adapted layers, all layers together.
        ranks: features between the two matrices, all layers together.
    """

    parameters: int = 0
    inputs: int = 0
    ranks: int = 0


def adapter_shapes(model: nn.Module) -> dict[Part, AdapterShape]:
    """The adapters of every part that has some; the model may be on the meta device."""
    shapes: dict[Part, AdapterShape] = {}
    for name, weight in model.named_parameters():
        if is_adapter(name):
            earlier = shapes.get(part_of(name), AdapterShape())
            rank, width = weight.shape if ".lora_A." in name else (0, 0)
            shapes[part_of(name)] = AdapterShape(
                earlier.parameters + weight.numel(), earlier.inputs + width, earlier.ranks + rank
            )
    return shapes


def merge_adapters(weights: Mapping[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """The weights of a model without adapters that computes the same, under its own names.

    Args:
        weights: state dict of the model with adapters; whole tensors, as ZeRO-3 gathers them.
        settings: those that the adapters were made with.

    Returns:
        Tensors of the types of the adapted weights; sums are taken in float32 and rounded once, and are in host memory.
    """
    scaling = settings.alpha / settings.rank
    merged = {}
    for name, tensor in weights.items():
        if is_adapter(name):
            continue
        layer = name.removesuffix(f"{_BASE}weight")
        if layer != name:
            down, up = weights[f"{layer}.lora_A.default.weight"], weights[f"{layer}.lora_B.default.weight"]
            tensor = (tensor.float() + scaling * (up.float() @ down.float())).to(tensor.dtype).cpu()
        merged[name.replace(_BASE, ".")] = tensor
    return merged


def save_adapters(folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], start: str) -> None:
    """Write the adapters as peft does, for its `PeftModel.from_pretrained(model, folder / "adapter")`.

    Args:
        folder: of the checkpoint; they go into a folder inside it.
        model: the model with adapters.
        weights: its state dict, whole tensors.
        start: what the adapters were trained on.
    """
    target = folder / ADAPTER_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = start
    config.save_pretrained(target)
    adapters = {
        _PEFT_PREFIX + name.replace(_OWN, "."): tensor.contiguous()
        for name, tensor in weights.items()
        if is_adapter(name)
    }
    save_file(adapters, target / _WEIGHTS_NAME, metadata={"format": "pt"})


def unmerge(model: nn.Module, merged: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """State dict for a model with adapters, from a checkpoint of such a model.

    The adapted weights stay what they are in `model`, which comes from the stage's start: taking the adapters off the
    checkpoint's merged weights would round them.

    Args:
        model: the model with adapters, loaded from the start.
        merged: the weights of the checkpoint, adapters merged.
        folder: of the checkpoint.
    """
    adapters = load_file(folder / ADAPTER_FOLDER / _WEIGHTS_NAME)
    weights = {}
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            weights[name] = adapters[_PEFT_PREFIX + name.replace(_OWN, ".")]
        elif name.endswith(f"{_BASE}weight"):
            weights[name] = tensor
        else:
            weights[name] = merged[name.replace(_BASE, ".")]
    return weights
