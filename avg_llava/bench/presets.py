"""Random models of three sizes: weights do not affect times."""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration

Preset = Literal["mini", "proportioned", "7b"]
_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        vision: Width, layers, feed-forward width and heads of the vision tower.
        language: The same of the language model.
        vocabulary: Tokens; the image placeholder is the id after the last.
        crop: Side of a crop in pixels.
        patch: Side of a patch in pixels.
        router_feed_forward: Feed-forward width of the router; None takes the language model's width.
    """

    vision: tuple[int, int, int, int]
    language: tuple[int, int, int, int]
    vocabulary: int
    crop: int
    patch: int
    router_feed_forward: int | None = None

    def config(self) -> AvgLlavaConfig:
        """The model configuration, without dropout: variants of a training step must compute the same loss."""
        tower = dict(zip(_SIZES, self.vision, strict=True))
        text = dict(zip(_SIZES, self.language, strict=True))
        return AvgLlavaConfig(
            vision_config=CLIPVisionConfig(**tower, image_size=self.crop, patch_size=self.patch),
            text_config=LlamaConfig(**text, vocab_size=self.vocabulary, max_position_embeddings=4096),
            image_token_index=self.vocabulary,
            router_config={"intermediate_size": self.router_feed_forward, "dropout": 0.0},
        )


PRESETS: dict[Preset, ModelShape] = {
    "mini": ModelShape((64, 3, 128, 2), (128, 4, 344, 4), 512, crop=48, patch=6),
    # Width 512, 16 layers and 32,000 tokens, with CLIP's crops. Relative to the language model's layers at the finest
    # level the tower takes 5% of the operations, as in the 7B model, and the router 9% instead of 4%: the share of its
    # attention over 1,148 tokens grows as the width shrinks.
    "proportioned": ModelShape(
        (192, 4, 768, 3), (512, 16, 1376, 8), 32_000, crop=336, patch=14, router_feed_forward=128
    ),
    "7b": ModelShape((1024, 24, 4096, 16), (4096, 32, 11_008, 32), 32_000, crop=336, patch=14),
}


def check_device(preset: Preset) -> None:
    """Raises `ValueError` if the preset needs a GPU and there is none."""
    if preset == "7b" and not torch.cuda.is_available():
        raise ValueError("the preset 7b needs a GPU; on a CPU, --preset proportioned keeps its proportions")


def compute_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_model(config: AvgLlavaConfig) -> AvgLlavaForConditionalGeneration:
    """A model with the same random weights in every process; bfloat16 on a GPU, float32 on a CPU."""
    device = compute_device()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        model = AvgLlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return model
