"""Backbones: a vision tower and a language model that a model is built from."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from avg_llava.checkpoints.checkpoint import ROUTER_KEYS, Checkpoint, Renaming, WeightSource
from avg_llava.checkpoints.weight_files import resolve_folder
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.towers import find_tower

LANGUAGE_KEYS: Renaming = [
    (r"^.*rotary_emb\.inv_freq$", None),
    (r"^model\.", "model.language_model."),
    (r"^lm_head\.", "lm_head."),
]


def join_backbones(vision_path: str | Path, language_path: str | Path, **config_fields: Any) -> Checkpoint:
    """A CLIP tower and a causal LM in transformers' format; arguments as for `build_from_backbones`."""
    config = config_from_backbones(vision_path, language_path, **config_fields)
    return Checkpoint(
        f"{vision_path} + {language_path}",
        config,
        (WeightSource(vision_path, config.tower.keys), WeightSource(language_path, LANGUAGE_KEYS)),
        fresh=(ROUTER_KEYS, "model.multi_modal_projector.", "model.image_newline"),
    )


def config_from_backbones(vision_path: str | Path, language_path: str | Path, **config_fields: Any) -> AvgLlavaConfig:
    """Configuration of a model of two backbones; arguments as for `build_from_backbones`."""
    vision_config = vision_part(AutoConfig.from_pretrained(resolve_folder(vision_path)))
    text_config = AutoConfig.from_pretrained(resolve_folder(language_path))
    return AvgLlavaConfig(
        vision_config=find_tower(vision_config).without_head(vision_config),
        text_config=text_config,
        image_token_index=text_config.vocab_size,
        tie_word_embeddings=text_config.tie_word_embeddings,
        **config_fields,
    )


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision tower's configuration, from that of a tower or of a whole CLIP model."""
    return config.vision_config if "vision_config" in config.sub_configs else config
