"""Layouts of checkpoints: how each is recognised, its configuration, and the names of its weights.

To support another layout, write a function that describes it as a :class:`Checkpoint`, enter it in `LAYOUTS` and let
:func:`detect_layout` recognise it by its `config.json`. Folder names mean nothing.
"""

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig

from avg_llava.checkpoints.backbones import vision_part
from avg_llava.checkpoints.checkpoint import ROUTER_KEYS, Checkpoint, Renaming, WeightSource, rename_keys
from avg_llava.checkpoints.templates import template_of_llava
from avg_llava.checkpoints.weight_files import StoredTensor, list_tensors, read_config, resolve_folder, weight_files
from avg_llava.model.configuration import AvgLlavaConfig, Behavior, RouterConfig

ORIGINAL_KEYS: Renaming = [
    (r"^.*rotary_emb\.inv_freq$", None),
    (r"^.*\.position_ids$", None),
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^(model\.(?:router|image_newline).*)$", r"\1"),
    (r"^model\.", "model.language_model."),
    (r"^lm_head\.", "lm_head."),
]
# `save_pretrained` maps some of this package's names to older ones.
SAVED_KEYS: Renaming = [
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", r"model.\1"),
]

# Towers that original-format checkpoints name without shipping their configuration.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
}


def detect_layout(raw_config: Mapping[str, Any], folder: Path) -> str:
    """The key in `LAYOUTS` of a folder, from its parsed `config.json`.

    Raises:
        ValueError: The model type is unknown.
    """
    model_type = str(raw_config.get("model_type"))
    if model_type in ("llava_next", AvgLlavaConfig.model_type):
        return model_type
    if model_type.startswith("llava_"):  # llava_llama, llava_mistral, ...
        return "original"
    raise ValueError(
        f"{folder / 'config.json'}: model_type {model_type!r} is neither an original LLaVA-NeXT checkpoint "
        f"(llava_llama, ...), nor 'llava_next', nor '{AvgLlavaConfig.model_type}'"
    )


def open_checkpoint(path: str | Path, behavior: Behavior | None = None) -> Checkpoint:
    """Describes the checkpoint in a folder or hub repository; `behavior` None takes the layout's default."""
    folder = resolve_folder(path)
    raw_config = read_config(folder)
    return LAYOUTS[detect_layout(raw_config, folder)](str(path), folder, raw_config, behavior)


def _original(name: str, folder: Path, raw_config: Mapping[str, Any], behavior: Behavior | None) -> Checkpoint:
    """LLaVA-NeXT or AVG-LLaVA as saved by the original code; the vision tower may be in another repository."""
    keys = rename_keys(list_tensors(weight_files(folder)), ORIGINAL_KEYS)
    has_router = any(key.startswith(ROUTER_KEYS) for key in keys)
    sources = [WeightSource(folder, ORIGINAL_KEYS)]
    config = _config_from_original(raw_config, folder, behavior, has_router)
    if not any(key.startswith("model.vision_tower.") for key in keys):
        sources.append(WeightSource(raw_config["mm_vision_tower"], config.tower.keys, relative_to=folder))
    return Checkpoint(name, config, tuple(sources), fresh=() if has_router else (ROUTER_KEYS,))


def _transformers(name: str, folder: Path, raw_config: Mapping[str, Any], behavior: Behavior | None) -> Checkpoint:
    """AVG-LLaVA as saved by this package, or LLaVA-NeXT in transformers' format, which has no router."""
    fields = {key: value for key, value in raw_config.items() if key not in ("model_type", "architectures")}
    if behavior is not None:
        fields["behavior"] = behavior
    config = AvgLlavaConfig(**fields)
    is_ours = raw_config["model_type"] == AvgLlavaConfig.model_type
    if not is_ours:
        config.template = template_of_llava(folder, config.text_config.model_type, has_own=True)
    fresh = () if is_ours else (ROUTER_KEYS,)
    return Checkpoint(name, config, (WeightSource(folder, []),), native_folder=folder, fresh=fresh)


LAYOUTS: dict[str, Callable[[str, Path, Mapping[str, Any], Behavior | None], Checkpoint]] = {
    "original": _original,
    "llava_next": _transformers,
    AvgLlavaConfig.model_type: _transformers,
}


def _config_from_original(
    raw: Mapping[str, Any], folder: Path, behavior: Behavior | None, has_router: bool
) -> AvgLlavaConfig:
    """Translates the flat `config.json` of the original code.

    Its pinpoints are (width, height); they become (height, width) in the same order, so that ties between grids are
    decided as in the original.
    """
    for key, known in {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}.items():
        if raw.get(key) != known:
            raise ValueError(f"{folder / 'config.json'}: {key} is {raw.get(key)!r}; only {known!r} is supported")
    text_type = str(raw["model_type"]).removeprefix("llava_")
    text_class = type(AutoConfig.for_model(text_type))
    fields = {key: value for key, value in raw.items() if not key.startswith(("mm_", "image_", "model_type"))}
    text_config = text_class(**{key: value for key, value in fields.items() if hasattr(text_class(), key)})
    pinpoints = raw["image_grid_pinpoints"]
    pinpoints = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
    router = {"num_text_tokens": raw["filtered_text_num"]} if "filtered_text_num" in raw else {}
    return AvgLlavaConfig(
        vision_config=_tower_config(str(raw["mm_vision_tower"]), folder),
        text_config=text_config,
        image_token_index=text_config.vocab_size,
        tie_word_embeddings=text_config.tie_word_embeddings,
        image_grid_pinpoints=[[height, width] for width, height in pinpoints],
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        granularities=raw.get("vis_token_granularity") or [],
        behavior=behavior or ("released" if has_router else "paper"),
        router_config=RouterConfig(**router),
        max_sequence_length=raw.get("tokenizer_model_max_length") or text_config.max_position_embeddings,
        template=template_of_llava(folder, text_type, has_own=False),
    )


def _tower_config(name: str, folder: Path) -> PreTrainedConfig:
    if name in KNOWN_TOWERS and not (folder / name).is_dir():
        return CLIPVisionConfig(**KNOWN_TOWERS[name])
    return vision_part(AutoConfig.from_pretrained(resolve_folder(name, folder)))


def list_weights(folder: Path) -> dict[str, StoredTensor]:
    """Positions in the files of the weights of a checkpoint of this package, under its names in memory."""
    return rename_keys(list_tensors(weight_files(folder)), SAVED_KEYS)
