"""Low-rank adapters (LoRA) through peft, in the language model and optionally in the vision tower.

Projector, newline and router have no adapters: a stage trains or freezes them whole. peft wraps every adapted layer, so
that `...q_proj.weight` becomes `...q_proj.base_layer.weight`, `...q_proj.lora_A.default.weight` and `lora_B`. These
names exist only in the training process: checkpoints and results are whole models with the adapters merged into their
weights, and are loaded like any other. The adapters are saved next to them in `adapter/`, in peft's format, with the
parts that are trained whole; a run continues from these and from the stage's start, without rounding.

With `lora.quantization` (QLoRA) the adapters are trained on 4-bit weights, but merged into those that the start's files
hold: the result is a model in full precision, which differs from the trained one by the error of quantisation.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from avg_llava.checkpoints.checkpoint import Checkpoint
from avg_llava.checkpoints.weight_files import CheckpointError, read_file
from avg_llava.common.settings import ConfigError
from avg_llava.model.language import language_parts
from avg_llava.training.config import LoraSettings
from avg_llava.training.stages import Part, is_adapter, part_of

ADAPTER_FOLDER = "adapter"
_WEIGHTS_NAME, _OTHERS_NAME = "adapter_model.safetensors", "other_parts.safetensors"
# Name parts of adapted weights, of adapters, and prefix in peft's files.
_BASE, _ADAPTER, _PEFT_PREFIX = ".base_layer.", ".default.", "base_model.model."


def add_adapters(model: PreTrainedModel, settings: LoraSettings, seed: int) -> None:
    """Adds adapters, initialized from `seed`, to linear layers of the whole model, whose outputs do not change yet.

    Raises:
        ConfigError: The language model has no layer that the settings name.
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
    """Last components of the names of a part's linear layers, without the language model's head.

    PyTorch's own attention (of open_clip's towers) reads the weights of its layers without calling them.
    """
    return {
        f"{name}.{child}".rsplit(".", 1)[-1]
        for name, parent in model.named_modules()
        for child, module in parent.named_children()
        if isinstance(module, nn.Linear) and not isinstance(parent, nn.MultiheadAttention)
        if name and part_of(f"{name}.{child}.weight") == part
    }


def _pattern(prefix: str, known: set[str], wanted: tuple[str, ...] | None) -> str:
    """Regular expression for the full names of the wanted layers; None: all known ones."""
    unknown = sorted(set(wanted or ()) - known)
    if unknown:
        raise ConfigError(
            f"lora.target_modules names {', '.join(unknown)}; the language model's linear layers are "
            f"{', '.join(sorted(known))}"
        )
    return rf"{re.escape(prefix)}\..*\.(?:{'|'.join(sorted(wanted or known))})"


class AdapterShape(NamedTuple):
    """Sizes of the adapters of a part, summed over its layers.

    Attributes:
        inputs: Input features of the adapted layers.
        ranks: Features between the two matrices.
    """

    parameters: int = 0
    inputs: int = 0
    ranks: int = 0


def adapter_shapes(model: nn.Module) -> dict[Part, AdapterShape]:
    """Adapter sizes of every part with adapters; the model may be on the meta device."""
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
    """State dict of the equivalent model without adapters.

    Args:
        weights: State dict of the model with adapters; whole tensors, as gathered by ZeRO-3.

    Returns:
        Merged weights in the dtypes of the adapted ones, summed in float32 and rounded once, in host memory; all other
        tensors unchanged.
    """
    scaling = settings.alpha / settings.rank
    merged = {}
    for name, tensor in weights.items():
        if is_adapter(name):
            continue
        layer = name.removesuffix(f"{_BASE}weight")
        if layer != name:
            down, up = (weights[f"{layer}.lora_{side}.default.weight"].to(tensor.device) for side in "AB")
            tensor = (tensor.float() + scaling * (up.float() @ down.float())).to(tensor.dtype).cpu()
        merged[name.replace(_BASE, ".")] = tensor
    return merged


def with_start_weights(model: nn.Module, weights: Mapping[str, Tensor], start: Checkpoint) -> dict[str, Tensor]:
    """State dict with the weights of a start's files in place of the frozen ones, which are quantised or rounded.

    Args:
        model: The model in training.
        weights: Its state dict, without quantised weights.
        start: The checkpoint that it was loaded from.

    Returns:
        Frozen weights mapped from the files, and trained ones rounded to the data types of the files. Parts that the
        start does not have stay as they are.

    Raises:
        CheckpointError: The files lack a quantised weight.
    """
    stored = start.stored()
    whole = dict(weights)
    for name, parameter in model.named_parameters():
        original = stored.get(name.replace(_BASE, "."))
        if original is not None:
            whole[name] = weights[name].to(original.dtype) if parameter.requires_grad else original.read()
        elif name not in weights:
            raise CheckpointError(
                f"{start.name} no longer holds {name.replace(_BASE, '.')}, which the adapters belong to"
            )
    return whole


def without_adapters(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model on the meta device as its start is, without adapters and quantised layers, to save `weights` with."""
    embeddings = language_parts(model.config.text_config).embeddings
    with torch.device("meta"):
        whole = type(model)(model.config).to(weights[f"model.language_model.{embeddings}.weight"].dtype)
    whole.generation_config = model.generation_config
    return whole


def save_adapters(folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], start: str) -> None:
    """Writes the adapters in peft's format, for `PeftModel.from_pretrained(model, folder / "adapter")`.

    All weights of parts without adapters are written to a file of their own.

    Args:
        weights: State dict of the model, whole tensors.
        start: Path of the base model, for peft's configuration.
    """
    target = folder / ADAPTER_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = start
    config.save_pretrained(target)
    adapters = {
        _PEFT_PREFIX + name.replace(_ADAPTER, "."): tensor.contiguous()
        for name, tensor in weights.items()
        if is_adapter(name)
    }
    save_file(adapters, target / _WEIGHTS_NAME, metadata={"format": "pt"})
    adapted = _adapted_parts(weights)
    others = {name: tensor.contiguous() for name, tensor in weights.items() if part_of(name) not in adapted}
    save_file(others, target / _OTHERS_NAME, metadata={"format": "pt"})


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Loads what `save_adapters` wrote to the folder of a checkpoint into a model that was loaded from the start.

    Raises:
        CheckpointError: A file or a weight is missing.
    """
    target = folder / ADAPTER_FOLDER
    missing = [str(target / name) for name in (_WEIGHTS_NAME, _OTHERS_NAME) if not (target / name).is_file()]
    if missing:
        raise CheckpointError(f"no {' and no '.join(missing)}; pass --output.overwrite to train from the beginning")
    saved = read_file(target / _OTHERS_NAME)
    for name, tensor in read_file(target / _WEIGHTS_NAME).items():
        saved[name.removeprefix(_PEFT_PREFIX).replace(".weight", f"{_ADAPTER}weight")] = tensor
    names = model.state_dict().keys()
    adapted = _adapted_parts(names)
    wanted = {name for name in names if is_adapter(name) or part_of(name) not in adapted}
    if wanted != saved.keys():
        different = ", ".join(sorted(wanted ^ saved.keys())[:3])
        raise CheckpointError(
            f"{target} does not hold the trained weights of this run (missing or unknown: {different})"
        )
    model.load_state_dict(saved, strict=False)


def _adapted_parts(names: Iterable[str]) -> set[Part]:
    return {part_of(name) for name in names if is_adapter(name)}
