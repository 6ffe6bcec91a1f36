"""Backbones: a vision tower and a language model that a model is built from."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from avg_llava.checkpoints.checkpoint import ROUTER_KEYS, Checkpoint, Renaming, WeightSource
from avg_llava.checkpoints.configs import named_errors, read_auto_config
from avg_llava.checkpoints.open_clip_models import OpenClipSource, is_open_clip, open_clip_config
from avg_llava.checkpoints.weight_files import resolve_folder
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.language import language_parts
from avg_llava.model.towers import find_tower


def join_backbones(vision_path: str | Path, language_path: str | Path, **config_fields: Any) -> Checkpoint:
    """A vision tower and a causal LM; arguments as for `build_from_backbones`."""
    config = config_from_backbones(vision_path, language_path, **config_fields)
    vision = OpenClipSource if is_open_clip(vision_path) else WeightSource
    text = config.text_config
    return Checkpoint(
        f"{vision_path} + {language_path}",
        config,
        (
            vision(vision_path, config.tower.keys),
            WeightSource(language_path, language_keys(text), base=f"{language_parts(text).base}."),
        ),
        fresh=(ROUTER_KEYS, "model.multi_modal_projector.", "model.image_newline"),
    )


def config_from_backbones(vision_path: str | Path, language_path: str | Path, **config_fields: Any) -> AvgLlavaConfig:
    """Configuration of a model of two backbones; arguments as for `build_from_backbones`."""
    folder = resolve_folder(language_path)
    text_config = read_auto_config(folder)
    with named_errors(folder):
        language_parts(text_config)
    return join_configs(read_tower_config(vision_path), text_config, **config_fields)


def join_configs(vision_config: PreTrainedConfig, text_config: PreTrainedConfig, **fields: Any) -> AvgLlavaConfig:
    """Configuration of a model of a tower and a language model with the given configurations."""
    return AvgLlavaConfig(
        vision_config=find_tower(vision_config).without_head(vision_config),
        text_config=text_config,
        image_token_index=text_config.vocab_size,
        tie_word_embeddings=text_config.tie_word_embeddings,
        **fields,
    )


def read_tower_config(path: str | Path) -> PreTrainedConfig:
    """The configuration of a vision tower in a folder, a hub repository or open_clip."""
    if is_open_clip(path):
        return open_clip_config(path)
    return vision_part(read_auto_config(resolve_folder(path)))


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision tower's configuration, from that of a tower or of a whole CLIP model."""
    return config.vision_config if "vision_config" in config.sub_configs else config


def language_keys(config: PreTrainedConfig) -> Renaming:
    """Renaming of the keys of a published causal LM."""
    parts = language_parts(config)
    return [
        *((pattern, None) for pattern in parts.unused),
        (rf"^{parts.base}\.", "model.language_model."),
        *((pattern, "lm_head.") for pattern in parts.head_keys),
    ]
