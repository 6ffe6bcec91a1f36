"""transformers' ViT, as trained on ImageNet-21k, as a vision tower.

Once this file is imported, stage 1's `--model.vision google/vit-large-patch16-384` builds a model with it.
"""

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTModel

from avg_llava.model.towers import TOWERS, Tower


class ViTTower(Tower):
    """ViT has a class token and no norm before its layers; classifier and pooling are left out."""

    keys = [
        (r"^classifier\.|^(?:vit\.)?pooler\.", None),
        (r"^(?:vit\.)?", "model.vision_tower."),
    ]
    mean = std = (0.5, 0.5, 0.5)

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        return ViTModel(config, add_pooling_layer=False)

    def embed(self, tower: PreTrainedModel, pixels: Tensor) -> Tensor:
        return tower.embeddings(pixels)

    def layers(self, tower: PreTrainedModel) -> nn.ModuleList:
        return tower.layers


TOWERS["vit"] = ViTTower()
