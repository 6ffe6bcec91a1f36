"""AVG-LLaVA without the layers of its language model: enough to choose levels and to train the router.

Of the language model only the input embeddings and the final norm (a vector) are loaded. Saved checkpoints are
complete: weights that are not in memory are copied from the folder that the model was loaded from.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avg_llava.checkpoints.checkpoint import ROUTER_KEYS, rename_keys
from avg_llava.checkpoints.formats import TRANSFORMERS_KEYS, open_checkpoint
from avg_llava.checkpoints.loading import instantiate
from avg_llava.checkpoints.weight_files import CheckpointError, read_config, read_tensors, resolve_folder
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.saving import replaced_model


class RoutingModel(AvgLlavaForConditionalGeneration):
    """Encodes images and routes as the whole model does; it cannot run the language model.

    `config` is that of the whole model. Loaded by :func:`load_routing_model`.
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

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Writes a checkpoint of the whole model: this router, and all other weights of the source.

        Args:
            save_directory: The folder.
            state_dict: This model's weights if they are not in its modules, as under ZeRO-3.
            **kwargs: Refused.

        Raises:
            CheckpointError: The source uses other weight names than this package.
        """
        if kwargs:
            raise TypeError(f"save_pretrained of a model without language model takes no {', '.join(kwargs)}")
        weights = self.state_dict() if state_dict is None else state_dict
        router = {name: tensor.contiguous() for name, tensor in weights.items() if name.startswith(ROUTER_KEYS)}
        stored = rename_keys(read_tensors(self.source), TRANSFORMERS_KEYS)
        unknown = [name for name in weights if name not in stored and name not in router]
        if unknown:
            raise CheckpointError(
                f"{self.source} uses other weight names ({unknown[0]} is missing): rewrite it with `avg-llava "
                "convert`, and start from the result"
            )
        others = {name: tensor for name, tensor in stored.items() if not name.startswith(ROUTER_KEYS)}
        config = copy.deepcopy(self.config)
        config.dtype = self.dtype
        config.architectures = [AvgLlavaForConditionalGeneration.__name__]
        with replaced_model(save_directory) as folder:
            save_file(others | router, folder / "model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(folder)
            if self.generation_config is not None:
                self.generation_config.save_pretrained(folder)


def load_routing_model(path: str | Path, dtype: torch.dtype | str | None = None) -> RoutingModel:
    """Loads a model without the layers of its language model, in evaluation mode.

    Args:
        path: Folder or hub id of a checkpoint of this package.
        dtype: Data type of the weights; None keeps the checkpoint's.

    Raises:
        ValueError: The folder has another layout.
    """
    folder = resolve_folder(path)
    raw_config = read_config(folder)
    if raw_config.get("model_type") != AvgLlavaConfig.model_type:
        raise ValueError(
            f"{folder} is no checkpoint of this package (model_type {raw_config.get('model_type')!r}); rewrite it with "
            "`avg-llava convert`"
        )
    model = instantiate(RoutingModel, open_checkpoint(path), dtype)
    model.source = folder
    return model
