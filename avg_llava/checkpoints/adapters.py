"""Low-rank adapters (LoRA) in peft's files, merged into the weights of a base model when they are read."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from avg_llava.checkpoints.weight_files import CheckpointError, StoredTensor, list_tensors

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Fields of peft's configuration that change what is merged, and the values that are supported.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # others change the base model too
}


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
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        base, rank = settings["base_model_name_or_path"], settings["r"]
        alpha, alphas = settings["lora_alpha"], settings.get("alpha_pattern") or {}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is no configuration of peft's LoRA ({type(error).__name__}: {error})") from error
    for key, known in _SUPPORTED.items():
        if settings.get(key) not in known:
            raise CheckpointError(f"{file}: {key} is {settings[key]!r}; only {known[-1]!r} is supported")
    if not base:
        raise CheckpointError(f"{file} names no base_model_name_or_path; write the base model's folder or hub id there")
    if settings.get("revision") and not Path(base).exists():
        base = f"{base}@{settings['revision']}"
    weights = next((folder / name for name in _ADAPTER_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} holds {ADAPTER_CONFIG}, but neither {' nor '.join(_ADAPTER_FILES)}")
    stored = {key.replace(".default.", "."): tensor for key, tensor in list_tensors([weights]).items()}
    products, replaced = {}, {}
    for key, tensor in stored.items():
        name = key.removeprefix("base_model.model.")
        if ".lora_" not in name:
            replaced[name.replace(".modules_to_save.", ".")] = tensor
            continue
        layer, _, part = name.partition(".lora_")
        if part not in ("A.weight", "B.weight") or key.replace(".lora_A.", ".lora_B.") not in stored:
            raise CheckpointError(f"{weights}: {key} is no adapter of a linear layer, or its other half is missing")
        if part == "A.weight":
            up = stored[key.replace(".lora_A.", ".lora_B.")]
            # As in peft, a pattern matches the end of a layer's name.
            own = (value for pattern, value in alphas.items() if re.match(rf"(.*\.)?({pattern})$", layer))
            rank = tensor.shape[0]
            scaling = next(own, alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
            products[f"{layer}.weight"] = LowRank(tensor, up, scaling)
    return Adapter(folder, base, products, replaced)
