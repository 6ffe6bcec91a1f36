"""Vision towers: what every family of them adds to its modules in transformers or open_clip.

To add a family, subclass :class:`Tower`, override what differs, and enter an instance in :data:`TOWERS` under the
`model_type` of its configuration. `docs/examples/extending/tower.py` is a complete example.

Shapes: C crops, S crop side in pixels, P patches of a crop, X tokens before them (class token, registers), D width.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL.Image import Resampling
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from avg_llava.common.registry import find_entry
from avg_llava.model.open_clip_tower import OpenClipVisionConfig, OpenClipVisionModel

_TOWER = "model.vision_tower."


class FeedForward(NamedTuple):
    """Feed-forward part of a layer: `matrices` linear layers of `width` features, two, or three if it is gated."""

    width: int
    matrices: int


class Tower:
    """A family of vision transformers; this class describes CLIP's. It has no state: `config` is the tower's.

    Attributes:
        keys: (pattern, replacement) of the keys of a published checkpoint, the first match wins, None drops the key.
        mean: Of the pixels of each channel, where a checkpoint does not say.
        std: As `mean`.
    """

    keys: list[tuple[str, str | None]] = [
        (r"^.*\.position_ids$", None),
        (r"^(text_model\.|text_projection|visual_projection|logit_scale).*$", None),
        (r"^(?:vision_model\.)?", _TOWER),
    ]
    mean: Sequence[float] = OPENAI_CLIP_MEAN
    std: Sequence[float] = OPENAI_CLIP_STD

    def without_head(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of a tower without the parts that `keys` drops."""
        return config

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """The tower with random weights."""
        return AutoModel.from_config(config, trust_remote_code=False)

    def crop_size(self, config: PreTrainedConfig) -> int:
        """S."""
        return config.image_size

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        """X."""
        return 1

    def feed_forward(self, config: PreTrainedConfig) -> FeedForward:
        """Sizes of the feed-forward part of a layer."""
        return FeedForward(config.intermediate_size, 2)

    def pixel_statistics(self, config: PreTrainedConfig) -> dict[str, Any]:
        """`image_mean`, `image_std` and `resample` of an image processor, for a tower that comes without them."""
        return {"image_mean": list(self.mean), "image_std": list(self.std), "resample": Resampling.BICUBIC}

    def embed(self, tower: PreTrainedModel, pixels: Tensor) -> Tensor:
        """(C, 3, S, S) pixels to the input (C, X + P, D) of the first layer.

        Calls modules and uses no parameters of theirs: ZeRO-3 gathers those of a module when it is called.
        """
        return tower.pre_layrnorm(tower.embeddings(pixels))

    def layers(self, tower: PreTrainedModel) -> nn.ModuleList:
        """The Transformer layers, each a module from hidden states to hidden states."""
        return tower.encoder.layers

    def run_layer(self, tower: PreTrainedModel, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states (C, X + P, D) after one of the tower's layers."""
        return layer(hidden, attention_mask=None)

    def encode(self, tower: PreTrainedModel, pixels: Tensor, num_layers: int) -> Tensor:
        """Hidden states of the patches after `num_layers` layers: (C, 3, S, S) to (C, P, D), without the final norm."""
        hidden = self.embed(tower, pixels)
        for layer in self.layers(tower)[:num_layers]:
            hidden = self.run_layer(tower, layer, hidden)
        return hidden[:, self.num_prefix_tokens(tower.config) :]


class SiglipTower(Tower):
    """SigLIP, and SigLIP 2 of fixed resolution: no class token, no norm before the layers, attention pooling unused."""

    keys = [
        (r"^.*\.position_ids$", None),
        (r"^(text_model\.|logit_scale|logit_bias).*$", None),
        (r"^(?:vision_model\.)?head\..*$", None),
        (r"^(?:vision_model\.)?", _TOWER),
    ]
    mean, std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

    def without_head(self, config: PreTrainedConfig) -> PreTrainedConfig:
        config = copy.deepcopy(config)
        config.vision_use_head = False
        return config

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        return 0

    def embed(self, tower: PreTrainedModel, pixels: Tensor) -> Tensor:
        return tower.embeddings(pixels)


class Siglip2Tower(SiglipTower):
    """SigLIP 2 of native aspect ratio (NaFlex), on square crops of the size of its table of positions."""

    def crop_size(self, config: PreTrainedConfig) -> int:
        return round(config.num_patches**0.5) * config.patch_size

    def embed(self, tower: PreTrainedModel, pixels: Tensor) -> Tensor:
        size = tower.config.patch_size
        # Pixels of a patch row by row, channels last, as Siglip2ImageProcessor orders them.
        patches = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        # Positions are resized to the grid of an image, which here is the grid of the table.
        positions = torch.arange(patches.shape[1], device=patches.device)
        return tower.embeddings.patch_embedding(patches) + tower.embeddings.position_embedding(positions)


class Dinov2Tower(Tower):
    """DINOv2. Crops have the size of its table of positions (518 pixels as published)."""

    keys = [(r"^classifier\..*$", None), (r"^(?:dinov2(?:_with_registers)?\.)?", _TOWER)]
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    def feed_forward(self, config: PreTrainedConfig) -> FeedForward:
        width = int(config.hidden_size * config.mlp_ratio)
        return FeedForward((int(width * 2 / 3) + 7) // 8 * 8, 3) if config.use_swiglu_ffn else FeedForward(width, 2)

    def embed(self, tower: PreTrainedModel, pixels: Tensor) -> Tensor:
        return tower.embeddings(pixels)

    def layers(self, tower: PreTrainedModel) -> nn.ModuleList:
        return tower.encoder.layer


class Dinov2RegistersTower(Dinov2Tower):
    """DINOv2 with registers, which are dropped like the class token."""

    def num_prefix_tokens(self, config: PreTrainedConfig) -> int:
        return 1 + config.num_register_tokens


class OpenClipTower(Tower):
    """open_clip's own vision transformers; those that it takes from timm are refused by their configuration."""

    keys = [
        (r"^(?:module\.)?visual\.transformer\.resblocks\.", f"{_TOWER}layers."),
        (r"^(?:module\.)?visual\.(?=conv1\.|ln_pre\.|class_embedding|positional_embedding)", _TOWER),
        (r"^.*$", None),
    ]

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        return OpenClipVisionModel(config)

    def pixel_statistics(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {"image_mean": config.image_mean, "image_std": config.image_std, "resample": config.resample}

    def embed(self, tower: PreTrainedModel, pixels: Tensor) -> Tensor:
        return tower(pixels)

    def layers(self, tower: PreTrainedModel) -> nn.ModuleList:
        return tower.layers

    def run_layer(self, tower: PreTrainedModel, layer: nn.Module, hidden: Tensor) -> Tensor:
        return tower.run_layer(layer, hidden)


TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower(),
    "siglip_vision_model": SiglipTower(),
    "siglip2_vision_model": Siglip2Tower(),
    "dinov2": Dinov2Tower(),
    "dinov2_with_registers": Dinov2RegistersTower(),
    OpenClipVisionConfig.model_type: OpenClipTower(),
}
"""Families of vision towers by the `model_type` of their configuration."""


def find_tower(config: PreTrainedConfig) -> Tower:
    """The family of a tower. Raises ValueError that lists the known ones."""
    return find_entry(TOWERS, config.model_type, "vision_config.model_type")
