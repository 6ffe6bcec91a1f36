"""AVG-LLaVA without the layers of its language model: enough to choose levels and to train the router.

Of the language model only the input embeddings and the final norm (a vector) are loaded. Saved checkpoints are
complete: weights that are not in memory are copied from the checkpoint that the model was loaded from.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avg_llava.checkpoints.checkpoint import ROUTER_KEYS, Checkpoint
from avg_llava.checkpoints.formats import open_checkpoint
from avg_llava.checkpoints.loading import instantiate
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.saving import replaced_model


class RoutingModel(AvgLlavaForConditionalGeneration):
    """Encodes images and routes as the whole model does; it cannot run the language model.

    `config` is that of the whole model. Loaded by :func:`load_routing_model`.
    """

    _tied_weights_keys: dict[str, str] = {}
    _keys_to_ignore_on_load_unexpected = [r"^model\.language_model\.layers\.", r"^lm_head\."]

    source: Checkpoint
    """The checkpoint with the rest of the weights."""

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
        """
        if kwargs:
            raise TypeError(f"save_pretrained of a model without language model takes no {', '.join(kwargs)}")
        weights = self.state_dict() if state_dict is None else state_dict
        others = {name: each for name, each in self.source.tensors().items() if not name.startswith(ROUTER_KEYS)}
        # The router, and what the source lacks and was initialised.
        own = {name: tensor.contiguous() for name, tensor in weights.items() if name not in others}
        config = copy.deepcopy(self.config)
        config.dtype = self.dtype
        config.architectures = [AvgLlavaForConditionalGeneration.__name__]
        with replaced_model(save_directory) as folder:
            save_file(others | own, folder / "model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(folder)
            if self.generation_config is not None:
                self.generation_config.save_pretrained(folder)


def load_routing_model(path: str | Path, dtype: torch.dtype | str | None = None) -> RoutingModel:
    """Loads a model without the layers of its language model, in evaluation mode.

    Args:
        path: Folder or hub id, as for `load_model`.
        dtype: Data type of the weights; None keeps the checkpoint's.
    """
    checkpoint = open_checkpoint(path)
    model = instantiate(RoutingModel, checkpoint, dtype)
    model.source = checkpoint
    return model
