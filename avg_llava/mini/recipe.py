"""How the mini backbones are made: their sizes, and what is run to pretrain them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig

from avg_llava.mini.scenes import OVERVIEW
from avg_llava.mini.tokenizer import MAX_LENGTH
from avg_llava.model.processing import AvgLlavaImageProcessor

PATCH = 8
CROP = PATCH * OVERVIEW
# (rows, columns) of tiles, in the order of AvgLlavaConfig.
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
ROPE_THETA = 1e7


@dataclass(frozen=True)
class VisionPhase:
    """One phase of the tower's pretraining; each has its own warm-up and decay."""

    steps: int
    lr: float
    plain_weight: float
    """Weight in the loss of a patch without a mark; one with a mark has 1."""
    num_scenes: int = 12


@dataclass(frozen=True)
class LanguagePhase:
    """One phase of the language model's pretraining; each has its own warm-up and decay."""

    steps: int
    lr: float
    num_scenes: int
    single_site: bool
    """Pictures of 4x4 cells without an overview, instead of whole ones: short sequences full of marks."""
    caption_share: float
    """Share of scenes with a caption; the others have a conversation."""
    code_share: float = 0.5
    """Share of scenes that are drawn again until they hold a code, the slowest skill to learn."""


@dataclass(frozen=True)
class Recipe:
    """How the backbones are pretrained: what was run to make the shipped ones."""

    seed: int = 0
    vision: tuple[VisionPhase, ...] = (VisionPhase(1600, 1.5e-3, 1.0), VisionPhase(1500, 1.2e-3, 0.1))
    language: tuple[LanguagePhase, ...] = (
        LanguagePhase(800, 2e-3, 24, single_site=True, caption_share=1.0),
        LanguagePhase(900, 1.5e-3, 8, single_site=False, caption_share=0.5),
        LanguagePhase(500, 1.5e-3, 8, single_site=False, caption_share=0.15, code_share=0.2),
    )

    def shortened(self, share: float) -> Recipe:
        """The same recipe with `share` of the steps, to try it out."""

        def shorter(phase: Any) -> Any:
            return replace(phase, steps=max(2, round(share * phase.steps)))

        return replace(self, vision=tuple(map(shorter, self.vision)), language=tuple(map(shorter, self.language)))


def vision_config() -> CLIPVisionConfig:
    """The tower: one layer more than it uses, since features come from the layer before the last."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=CROP,
        patch_size=PATCH,
        hidden_act="gelu",
    )


def language_config(vocab_size: int) -> LlamaConfig:
    """A Llama of under a million parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        # Slow rotations: looking a mark up by content, hundreds of tokens back, must not depend on the distance.
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.06,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def image_processor() -> AvgLlavaImageProcessor:
    """The anyres processor of the tower's crops."""
    return AvgLlavaImageProcessor(
        size={"shortest_edge": CROP},
        crop_size={"height": CROP, "width": CROP},
        image_grid_pinpoints=[[CROP * rows, CROP * columns] for rows, columns in GRIDS],
    )
