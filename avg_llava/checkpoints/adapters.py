"""Low-rank adapters (LoRA) in peft's files, merged into the weights of a base model when they are read."""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from avg_llava.checkpoints.weight_files import CheckpointError, StoredTensor, list_tensors, read_json

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Values of fields of peft's configuration that are supported, where a field could change what is merged.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # others change the base model too
}
# Fields that are read here, or say how the adapters were trained. Of others only empty values are known to do nothing.
_KNOWN = {
    *("base_model_name_or_path", "revision", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora"),
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "bias", "modules_to_save"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "runtime_config"),
}
# A regular expression of these parts, with one wildcard at most, is matched quickly.
_WILDCARD = re.compile(r"\.[*+]|\\d\+|\[0-9\]\+")
_PATTERN = re.compile(r"(?:[\w.|^$()-]|\\[.d])*")
_LONGEST_NAME = 1000


@dataclass(frozen=True)
class LowRank:
    """A product `scaling * up @ down` that is added to a weight."""

    down: StoredTensor
    up: StoredTensor
    scaling: float

    def added_to(self, weight: StoredTensor) -> StoredTensor:
        """The merged weight, computed when it is read: in float32, rounded once, as by peft's `merge_and_unload`."""

        def read() -> Tensor:
            delta = (self.up.read().float() @ self.down.read().float()) * self.scaling
            return (weight.read().float() + delta).to(weight.dtype)

        parts = (weight, self.down, self.up)
        return StoredTensor(weight.file, weight.dtype, weight.shape, None, read, parts=parts)


@dataclass(frozen=True)
class Adapter:
    """The adapters of a folder.

    Attributes:
        folder: The folder.
        base: Folder or hub id of the base model.
        products: What is added, by the names of weights in the base model.
        replaced: Weights that stand in for those of the base model, by the same names.
    """

    folder: Path
    base: str
    products: Mapping[str, LowRank]
    replaced: Mapping[str, StoredTensor]

    def files(self) -> set[Path]:
        """Files of the configuration and the weights."""
        return {self.folder / ADAPTER_CONFIG, *(product.down.file for product in self.products.values())}

    def merged(self, tensors: Mapping[str, StoredTensor], rename: Callable[[str], str]) -> dict[str, StoredTensor]:
        """Weights with the adapters; `rename` gives the common name of a name in the base model.

        Raises:
            CheckpointError: A weight is missing, or an adapter does not fit it.
        """
        merged = dict(tensors) | {rename(name): tensor for name, tensor in self.replaced.items()}
        for name, product in self.products.items():
            weight = merged.get(rename(name))
            if weight is None:
                raise CheckpointError(f"{self.folder}: {name} is no weight of the base model {self.base}")
            if weight.shape != (product.up.shape[0], product.down.shape[1]):
                raise CheckpointError(
                    f"{self.folder}: the adapter of {name} makes {product.up.shape[0]} x {product.down.shape[1]} "
                    f"weights, and its base model {self.base} has {' x '.join(map(str, weight.shape))}"
                )
            merged[rename(name)] = product.added_to(weight)
        return merged


def read_adapter(folder: Path) -> Adapter:
    """The adapters in a folder of peft or of the original code, with the names of weights in memory.

    Raises:
        CheckpointError: A file is missing or damaged, or the adapters are of another kind than LoRA of linear layers.
    """
    file = folder / ADAPTER_CONFIG
    settings = read_json(file)
    for key, known in _SUPPORTED.items():
        if settings.get(key) not in known:
            raise CheckpointError(f"{file}: {key} is {settings.get(key)!r}; only {known[-1]!r} is supported")
    for key, value in settings.items():
        if key not in _SUPPORTED and key not in _KNOWN and value not in (None, False, [], {}):
            raise CheckpointError(f"{file}: {key} is {value!r}, which is not supported; null is")
    base = settings.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise CheckpointError(f"{file} names no base_model_name_or_path; write the base model's folder or hub id there")
    if settings.get("revision") and not os.path.exists(base):
        base = f"{base}@{settings['revision']}"
    rank_of = _per_layer(file, settings, "r", "rank_pattern", whole=True)
    alpha_of = _per_layer(file, settings, "lora_alpha", "alpha_pattern", whole=False)
    weights = next((folder / name for name in _ADAPTER_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} holds {ADAPTER_CONFIG}, but neither {' nor '.join(_ADAPTER_FILES)}")
    stored = {key.replace(".default.", "."): tensor for key, tensor in list_tensors([weights]).items()}
    products, replaced = {}, {}
    for key, tensor in stored.items():
        if len(key) > _LONGEST_NAME:
            raise CheckpointError(f"{weights}: the name of a weight has {len(key)} characters")
        name = key.removeprefix("base_model.model.")
        if ".lora_" not in name:
            replaced[name.replace(".modules_to_save.", ".")] = tensor
            continue
        layer, _, part = name.partition(".lora_")
        if part not in ("A.weight", "B.weight") or key.replace(".lora_A.", ".lora_B.") not in stored:
            raise CheckpointError(f"{weights}: {key} is no adapter of a linear layer, or its other half is missing")
        if part == "A.weight":
            up, rank = stored[key.replace(".lora_A.", ".lora_B.")], rank_of(layer)
            if (len(tensor.shape), len(up.shape)) != (2, 2) or tensor.shape[0] != rank or up.shape[1] != rank:
                raise CheckpointError(
                    f"{weights}: the adapter of {layer} is of shapes {tensor.shape} and {up.shape}, but its rank is "
                    f"{rank} in {file.name}"
                )
            scaling = alpha_of(layer) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
            products[f"{layer}.weight"] = LowRank(tensor, up, scaling)
    return Adapter(folder, base, products, replaced)


def _per_layer(
    file: Path, settings: Mapping[str, Any], key: str, patterns_key: str, whole: bool
) -> Callable[[str], float]:
    """A function that gives a layer's value: that of the first pattern that matches its name, else `settings[key]`.

    Raises:
        CheckpointError: A value is no number, a whole one above zero if `whole`, or a pattern is not a simple one.
    """
    own = settings.get(patterns_key) or {}
    if not isinstance(own, dict):
        raise CheckpointError(f"{file}: {patterns_key} is {own!r}, not values by pattern")
    for name, value in ((key, settings.get(key)), *own.items()):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**31
        if not is_number or (whole and (value < 1 or value != int(value))):
            raise CheckpointError(f"{file}: {name} is {value!r}, not a {'whole number above 0' if whole else 'number'}")
    compiled = []
    for pattern, value in own.items():
        if not _PATTERN.fullmatch(_WILDCARD.sub("", pattern, count=1)):
            raise CheckpointError(
                f"{file}: {pattern!r} of {patterns_key} is not supported; names of layers and one wildcard are"
            )
        try:
            # As in peft, a pattern matches the end of a layer's name.
            compiled.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except (re.error, RecursionError) as error:
            raise CheckpointError(f"{file}: {pattern!r} of {patterns_key} is no regular expression: {error}") from error
    default = settings[key]
    return lambda layer: next((value for regex, value in compiled if regex.match(layer)), default)
