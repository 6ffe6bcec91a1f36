"""Layouts of checkpoints: how each is recognised, its configuration, and the names of its weights.

To support another layout, write a function that describes it as a :class:`Checkpoint`, enter it in `LAYOUTS` and let
:func:`detect_layout` recognise it by its `config.json`. Folder names mean nothing.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, LlavaNextConfig
from transformers.utils import IMAGE_PROCESSOR_NAME

from avg_llava.checkpoints.checkpoint import NEWLINE_KEY, ROUTER_KEYS, Checkpoint, Renaming, WeightSource
from avg_llava.checkpoints.configs import named_errors
from avg_llava.checkpoints.original import KNOWN_TOWERS as KNOWN_TOWERS
from avg_llava.checkpoints.original import open_original
from avg_llava.checkpoints.parts import check_whole, open_adapter
from avg_llava.checkpoints.templates import template_of_llava
from avg_llava.checkpoints.weight_files import (
    read_config,
    resolve_folder,
)
from avg_llava.model.configuration import AvgLlavaConfig, Behavior

# Files of transformers' LLaVA-NeXT: the published ones first, then those with names that newer versions have in memory.
TRANSFORMERS_KEYS: Renaming = [
    (r"^.*rotary_emb\.inv_freq$", None),
    (r"^.*\.position_ids$", None),
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^image_newline", "model.image_newline"),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^language_model\.", "model.language_model."),
    (r"^vision_tower\.", "model.vision_tower."),
]


def detect_layout(raw_config: Mapping[str, Any], folder: Path) -> str:
    """The key in `LAYOUTS` of a folder, from its parsed `config.json`.

    `llava` is the type of LLaVA-1.5 in transformers, which has `text_config`, and of checkpoints of the original code.

    Raises:
        ValueError: The model type is unknown.
    """
    model_type = str(raw_config.get("model_type"))
    if model_type in (LlavaNextConfig.model_type, AvgLlavaConfig.model_type):
        return model_type
    if f"{model_type}_".startswith("llava_") and "text_config" not in raw_config:
        return "original"
    if model_type == LlavaConfig.model_type:
        return model_type
    raise ValueError(
        f"{folder / 'config.json'}: model_type {model_type!r} is neither an original LLaVA-NeXT checkpoint "
        f"(llava, llava_llama, ...), nor transformers' 'llava_next' or 'llava', nor '{AvgLlavaConfig.model_type}'; a "
        "language model or a vision tower starts stage 1, as model.language or model.vision"
    )


def open_checkpoint(path: str | Path, behavior: Behavior | None = None) -> Checkpoint:
    """Describes the checkpoint in a folder or hub repository; `behavior` None takes the layout's default.

    Raises:
        CheckpointError: Files are missing, or `config.json` has values that this package does not support.
    """
    folder = resolve_folder(path)
    check_whole(folder)
    adapted = open_adapter(str(path), folder, open_checkpoint, behavior)
    if adapted is not None:
        return adapted
    raw_config = read_config(folder)
    layout = detect_layout(raw_config, folder)
    with named_errors(folder):
        return LAYOUTS[layout](str(path), folder, raw_config, behavior)


def _transformers(name: str, folder: Path, raw_config: Mapping[str, Any], behavior: Behavior | None) -> Checkpoint:
    """AVG-LLaVA as saved by this package, or LLaVA-NeXT or LLaVA-1.5 of transformers, which have no router."""
    fields = {key: value for key, value in raw_config.items() if key not in ("model_type", "architectures")}
    if behavior is not None:
        fields["behavior"] = behavior
    if fields.pop("use_image_newline_parameter", True) is not True:
        raise ValueError("use_image_newline_parameter is false; only models with an image_newline are supported")
    config = AvgLlavaConfig(**fields)
    # `avg-llava convert` writes null where the source has no router.
    fresh: tuple[str, ...] = (ROUTER_KEYS,) if raw_config.get("router_config", {}) is None else ()
    notes: tuple[str, ...] = ()
    if raw_config["model_type"] != AvgLlavaConfig.model_type:
        fresh = (ROUTER_KEYS,)
        config.template = template_of_llava(folder, config.text_config.model_type, has_own=True)
        _check_image_settings(folder, config)
    if raw_config["model_type"] == LlavaConfig.model_type:
        fresh += (NEWLINE_KEY,)
        notes = (
            "it is LLaVA-1.5, trained on single crops: from now on images are tiled (anyres) and every row of tokens "
            "ends with a new image_newline, so its answers are not those of the checkpoint until stage 2 or 3 has "
            "trained it",
        )
    return Checkpoint(
        name,
        config,
        (WeightSource(folder, TRANSFORMERS_KEYS),),
        fresh=fresh,
        folder=folder,
        tokenizer=folder,
        image_settings=folder,
        notes=notes,
    )


def _check_image_settings(folder: Path, config: AvgLlavaConfig) -> None:
    """Raises a ValueError if `preprocessor_config.json` asks for other crops than the model is run on here."""
    file = folder / IMAGE_PROCESSOR_NAME
    if not file.is_file():
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    pinpoints = settings.get("image_grid_pinpoints")
    if pinpoints is not None and [list(pair) for pair in pinpoints] != config.image_grid_pinpoints:
        raise ValueError(f"image_grid_pinpoints {config.image_grid_pinpoints} differ from {pinpoints} of {file.name}")
    for key in ("do_resize", "do_convert_rgb"):
        if settings.get(key) is False:
            raise ValueError(f"{key} is false in {file.name}, which is not supported; true is")


LAYOUTS: dict[str, Callable[[str, Path, Mapping[str, Any], Behavior | None], Checkpoint]] = {
    "original": open_original,
    LlavaConfig.model_type: _transformers,
    LlavaNextConfig.model_type: _transformers,
    AvgLlavaConfig.model_type: _transformers,
}
