"""AVG-LLaVA without its language model: all that choosing a level needs, and all that router training holds.

Of the language model only the input embeddings (and the norm before its head, a vector) are there. A checkpoint of such
a model is complete all the same: what is not in memory is copied from the folder that the model came from.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avg_llava.checkpoints.loading import (
    ROUTER_KEYS,
    check_loaded,
    config_from_transformers,
    list_weights,
    read_config,
    resolve_folder,
)
from avg_llava.checkpoints.weight_files import INDEX_NAME, CheckpointError, list_tensors, merge
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration

_OWN_NAME = ".own.safetensors"


class RoutingModel(AvgLlavaForConditionalGeneration):
    """Encodes images and routes, as the whole model does; it cannot run its language model.

    `config` is the whole model's. Made by :func:`load_routing_model`.
    """

    _tied_weights_keys: dict[str, str] = {}
    _keys_to_ignore_on_load_unexpected = [r"^model\.language_model\.layers\.", r"^lm_head\."]

    source: Path
    """Folder with the rest of the weights."""

    def __init__(self, config: AvgLlavaConfig):
        shallow = copy.deepcopy(config)
        shallow.text_config.num_hidden_layers = 0
        if "layer_types" in shallow.text_config.to_dict():
            shallow.text_config.layer_types = []
        super().__init__(shallow)
        self.config = config
        self.lm_head = nn.Identity()  # type: ignore[assignment]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Writes a checkpoint of the whole model; the router is this one's, all else is the source's.

        Args:
            save_directory: The folder.
            state_dict: This model's weights where they are not in it, as under ZeRO-3.
            **kwargs: Refused; here because transformers has more.

        Raises:
            CheckpointError: The source does not name its weights as this package does.
        """
        if kwargs:
            raise TypeError(f"save_pretrained of a model without language model takes no {', '.join(kwargs)}")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        router = {name: tensor.contiguous() for name, tensor in weights.items() if name.startswith(ROUTER_KEYS)}
        own = folder / _OWN_NAME
        save_file(router, own)
        merged = list_weights(self.source)
        unknown = [name for name in weights if not name.startswith(ROUTER_KEYS) and name not in merged]
        if unknown:
            raise CheckpointError(
                f"{self.source} names its weights in another way ({unknown[0]} is missing): rewrite it with `avg-llava "
                "convert`, and start from the result"
            )
        merged = {name: tensor for name, tensor in merged.items() if not name.startswith(ROUTER_KEYS)}
        for stale in (*folder.glob("model-*-of-*.safetensors"), folder / INDEX_NAME):
            stale.unlink(missing_ok=True)
        merge(folder / "model.safetensors", merged | list_tensors([own]))
        own.unlink()
        config = copy.deepcopy(self.config)
        config.dtype = self.dtype
        config.architectures = [AvgLlavaForConditionalGeneration.__name__]
        config.save_pretrained(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)


def load_routing_model(path: str | Path, dtype: torch.dtype | str | None = None) -> RoutingModel:
    """Loads a model without its language model, in evaluation mode.

    Args:
        path: Folder or hub id of a checkpoint in transformers' format.
        dtype: Data type of the weights; None keeps the checkpoint's.

    Raises:
        ValueError: The folder is of another kind.
        CheckpointError: Weights are missing, unexpected or of the wrong shape; all are listed.
    """
    folder = resolve_folder(path)
    raw_config = read_config(folder)
    if raw_config.get("model_type") != AvgLlavaConfig.model_type:
        raise ValueError(
            f"{folder} is no checkpoint of this package (model_type {raw_config.get('model_type')!r}); rewrite it with "
            "`avg-llava convert`"
        )
    model, info = RoutingModel.from_pretrained(
        folder,
        config=config_from_transformers(raw_config),
        dtype=dtype or "auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_loaded(info, str(path))
    model.source = folder
    return model.eval()


__all__ = ["RoutingModel", "load_routing_model"]
