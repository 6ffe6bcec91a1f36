"""Layout of the original code: LLaVA-1.5, LLaVA-NeXT (1.6), Open-LLaVA-NeXT and AVG-LLaVA.

`config.json` is that of the language model with flat fields for all else. `model_type` is `llava` or says the language
model (`llava_llama`, `llava_mistral`, ...); the vision tower is named by `mm_vision_tower`, often by a path of the
machine that trained it, and its weights are inside if it was trained. A field that changes what the model computes is
supported or refused by name.
"""

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from avg_llava.checkpoints.backbones import vision_part
from avg_llava.checkpoints.checkpoint import (
    NEWLINE_KEY,
    ROUTER_KEYS,
    Checkpoint,
    Renaming,
    WeightSource,
    rename_keys,
    tokenizer_folder,
)
from avg_llava.checkpoints.configs import read_auto_config
from avg_llava.checkpoints.templates import template_of_llava
from avg_llava.checkpoints.weight_files import resolve_folder, stored_tensors
from avg_llava.model.configuration import MAX_TILES, AvgLlavaConfig, Behavior, RouterConfig
from avg_llava.model.towers import find_tower

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
_TOWER = "model.vision_tower."

# Classes of the original code, and its `model_type` without `llava_`, by the language model's type in transformers.
TEXT_TYPES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
    "LlavaMixtralForCausalLM": "mixtral",
}
TEXT_NAMES = {"llama": "llama", "mistral": "mistral", "qwen": "qwen2", "mixtral": "mixtral"}

# Values that this package computes as the original code does.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": (None, "patch"),
    "mm_use_im_start_end": (None, False),
    "mm_resampler_type": (None,),
    "s2": (None, False),
}
# Fields that change nothing: of training, of videos, or repeated by the weights' shapes. `mm_use_im_patch_token` adds a
# token to the tokenizer that no prompt holds.
_WITHOUT_EFFECT = {
    "mm_hidden_size",
    "mm_projector_lr",
    "mm_vision_tower_lr",
    "mm_tunable_parts",
    "mm_use_im_patch_token",
    "mm_newline_position",
    "mm_spatial_pool_mode",
    "mm_spatial_pool_stride",
    "mm_spatial_pool_out_channels",
}
# Handled below.
_READ = {"mm_vision_tower", "mm_vision_select_layer", "mm_patch_merge_type"}

KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    f"openai/clip-vit-{name}": {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "image_size": image,
        "patch_size": patch,
        "projection_dim": projection,
    }
    for name, width, layers, image, patch, projection in [
        ("large-patch14-336", 1024, 24, 336, 14, 768),
        ("large-patch14", 1024, 24, 224, 14, 768),
        ("base-patch16", 768, 12, 224, 16, 512),
        ("base-patch32", 768, 12, 224, 32, 512),
    ]
} | {
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
}
"""Configurations of towers by hub id, which checkpoints name without shipping them."""


def known_tower(name: str) -> str | None:
    """The hub id in `KNOWN_TOWERS` with the same last part as a name or path; None if there is none."""
    base = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return next((known for known in KNOWN_TOWERS if known.split("/")[-1] == base), None)


def open_original(
    name: str,
    folder: Path,
    raw: Mapping[str, Any],
    behavior: Behavior | None,
    sources: tuple[WeightSource, ...] | None = None,
) -> Checkpoint:
    """Describes a checkpoint of the original code from its parsed `config.json`.

    Pinpoints are (width, height) there; they become (height, width) in the same order, so that ties between grids are
    decided as in the original. With levels or a router the checkpoint is AVG-LLaVA's and its behaviour "released".

    Args:
        sources: Files and folders of the weights, if they are not in the folder of `config.json`.

    Raises:
        ValueError: A field has a value that this package cannot reproduce; the message names it.
    """
    sources = sources or (WeightSource(folder, ORIGINAL_KEYS),)
    shapes = {
        key: tensor.shape
        for source in sources
        for key, tensor in rename_keys(stored_tensors(Path(source.path)), source.renaming).items()
    }
    has_router = any(key.startswith(ROUTER_KEYS) for key in shapes)
    is_avg = has_router or raw.get("vis_token_granularity") is not None
    _check_fields(raw)
    notes: list[str] = []
    tower = _find_tower(raw, folder, shapes, notes)
    family = find_tower(tower.config)
    if not tower.is_inside:
        sources += (WeightSource(tower.source, family.keys),)
    text_config = _text_config(raw)
    router = {"num_text_tokens": raw["filtered_text_num"]} if "filtered_text_num" in raw else {}
    tokenizer = tokenizer_folder(folder, Path(sources[0].path))
    is_tiled = _is_tiled(raw, notes)
    longest = text_config.max_position_embeddings
    config = AvgLlavaConfig(
        vision_config=family.without_head(tower.config),
        text_config=text_config,
        image_token_index=text_config.vocab_size,
        tie_word_embeddings=text_config.tie_word_embeddings,
        image_grid_pinpoints=_pinpoints(raw, family.crop_size(tower.config)) if is_tiled else None,
        vision_feature_layer=_feature_layer(raw, tower),
        granularities=raw.get("vis_token_granularity") or [],
        behavior=behavior or ("released" if is_avg else "paper"),
        router_config=RouterConfig(**router),
        max_sequence_length=(is_tiled and raw.get("tokenizer_model_max_length")) or longest,
        template=template_of_llava(tokenizer, text_config.model_type, has_own=False),
    )
    return Checkpoint(
        name,
        config,
        sources,
        fresh=(*(() if has_router else (ROUTER_KEYS,)), *(() if is_tiled or NEWLINE_KEY in shapes else (NEWLINE_KEY,))),
        folder=folder,
        tokenizer=tokenizer,
        image_settings=tower.folder or folder,
        notes=tuple(notes),
    )


def _check_fields(raw: Mapping[str, Any]) -> None:
    """Raises a ValueError that names the first field that changes what the model computes and is not supported."""
    fields = {"mm_projector_type": "linear"} | dict(raw)  # the original code's default
    for key, known in _SUPPORTED.items():
        if fields.get(key) not in known:
            wanted = " or ".join(repr(value) for value in known if value is not None) or "null"
            raise ValueError(f"{key} is {fields[key]!r}; only {wanted} is supported")
    for key, value in raw.items():
        known_key = key in _SUPPORTED or key in _WITHOUT_EFFECT or key in _READ
        if key.startswith("mm_") and not known_key and value not in (None, False):
            raise ValueError(f"{key} is {value!r}, which is not supported; null is")


def _feature_layer(raw: Mapping[str, Any], tower: "_Tower") -> int:
    """The layer of the tower whose output is used. Of SigLIP the original code cuts the last layer off for good."""
    if tower.config.model_type == "siglip_vision_model":
        return -1 if tower.is_inside else -2
    layer = raw.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int):
        raise ValueError(f"mm_vision_select_layer is {layer!r}; only one layer of the vision tower is supported")
    return layer


def _text_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Configuration of the language model: by the class in `architectures`, else by `model_type`."""
    architecture = next(iter(raw.get("architectures") or ()), None)
    model_type = str(raw["model_type"])
    text_type = TEXT_TYPES.get(str(architecture)) or TEXT_NAMES.get(model_type.removeprefix("llava_"))
    if text_type is None:
        raise ValueError(
            f"architectures {raw.get('architectures')} with model_type {model_type!r} is none of the original code's "
            f"that are supported: {', '.join(TEXT_TYPES)}"
        )
    default = AutoConfig.for_model(text_type)
    declared = default.to_dict().keys() | {"rope_theta", "rope_scaling"}
    foreign = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}
    return type(default)(**{key: value for key, value in raw.items() if key in declared - foreign})


def _is_tiled(raw: Mapping[str, Any], notes: list[str]) -> bool:
    """True if images are tiled as here, with a newline token per row.

    False for LLaVA-1.5, whose images are a single padded crop: it is a start for stages that train the language model,
    and a note says what changes.

    Raises:
        ValueError: Images become tokens in another way.
    """
    aspect, merge = raw.get("image_aspect_ratio") or "square", raw.get("mm_patch_merge_type") or "flat"
    limit = re.fullmatch(r"anyres(?:_max_(\d+))?", str(aspect))
    if limit is None and aspect not in ("square", "pad"):
        raise ValueError(f"image_aspect_ratio is {aspect!r}; 'anyres', 'pad' and 'square' are supported")
    if merge not in ("spatial_unpad", "flat"):
        raise ValueError(f"mm_patch_merge_type is {merge!r}; 'spatial_unpad' and 'flat' are supported")
    if limit is not None and merge == "spatial_unpad":
        return True
    notes.append(
        f"it was trained with image_aspect_ratio {aspect!r} and mm_patch_merge_type {merge!r}: from now on images are "
        "tiled (anyres) and every row of tokens ends with a new image_newline, so its answers are not those of the "
        "checkpoint until stage 2 or 3 has trained it"
    )
    return False


def _pinpoints(raw: Mapping[str, Any], crop: int) -> list[list[int]]:
    """The resolutions of `image_grid_pinpoints` as (height, width): a list, its text, or a range `(1x1),...,(6x6)`.

    A range counts crops, and the original code multiplies it by the crop size. `anyres_max_N` is refused where it has
    an effect: it shrinks the token maps of more than 1.21 N tiles.
    """
    value = raw.get("image_grid_pinpoints")
    if isinstance(value, str) and "x" in value:
        ends = [(int(width), int(height)) for width, height in re.findall(r"\((\d+)x(\d+)\)", value)]
        if not ends:
            raise ValueError(f"image_grid_pinpoints {value!r} is no range of the form (1x1),...,(6x6)")
        (first_width, first_height), (last_width, last_height) = ends[0], ends[-1]
        if (last_width - first_width) * (last_height - first_height) > MAX_TILES:
            raise ValueError(f"image_grid_pinpoints {value!r} is a range of more than {MAX_TILES} pairs")
        pairs = [
            (crop * width, crop * height)
            for width in range(first_width, last_width + 1)
            for height in range(first_height, last_height + 1)
        ]
    else:
        try:
            parsed: Any = ast.literal_eval(value) if isinstance(value, str) else value
            pairs = [(int(width), int(height)) for width, height in parsed]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError(f"image_grid_pinpoints {value!r} is no list of [width, height]") from error
    if not pairs:
        raise ValueError(f"image_grid_pinpoints {value!r} holds no pair of sides")
    limit = re.search(r"anyres_max_(\d+)", raw["image_aspect_ratio"])
    most = max(width * height for width, height in pairs) / crop**2
    if limit is not None and most > 1.21 * int(limit[1]):
        raise ValueError(
            f"image_aspect_ratio is {raw['image_aspect_ratio']!r} with up to {most:.0f} tiles, whose tokens the "
            "original code interpolates; that is not supported, fewer pinpoints are"
        )
    return [[height, width] for width, height in pairs]


@dataclass(frozen=True)
class _Tower:
    """The vision tower that a checkpoint names.

    Attributes:
        config: Its configuration.
        is_inside: Its weights are in the checkpoint.
        source: Folder or hub id of its weights, if they are not.
        folder: Local folder with its image settings, if there is one.
    """

    config: PreTrainedConfig
    is_inside: bool
    source: str | Path
    folder: Path | None


def _find_tower(
    raw: Mapping[str, Any], folder: Path, shapes: Mapping[str, tuple[int, ...]], notes: list[str]
) -> _Tower:
    """Finds the tower: a folder of that name, a known tower with the same last part, the weights inside, or the hub.

    Weights inside win over a configuration of other shapes.
    """
    name = raw.get("mm_vision_tower")
    if not isinstance(name, str):
        raise ValueError(f"mm_vision_tower is {name!r}, so the checkpoint has no vision tower")
    known = known_tower(name)
    is_inside = any(key.startswith(_TOWER) for key in shapes)
    local = next((path for path in (folder / name, Path(name).expanduser()) if path.is_dir()), None)
    if local is None and known is None and not is_inside:
        try:
            local = resolve_folder(name)
        except ValueError as error:
            raise ValueError(
                f"mm_vision_tower is {name!r}, whose weights are not in the checkpoint, and which is neither a folder "
                f"here nor a known tower ({', '.join(KNOWN_TOWERS)}): {error}"
            ) from error
    config = None
    if local is not None:
        config = vision_part(read_auto_config(local))
    elif known is not None:
        config = AutoConfig.for_model(**KNOWN_TOWERS[known])
    if is_inside:
        config = _fitting_config(shapes, config, name, notes)
    assert config is not None, "a tower that is not inside is local or known"
    return _Tower(config, is_inside, local or known or name, local)


def _fitting_config(
    shapes: Mapping[str, tuple[int, ...]], expected: PreTrainedConfig | None, name: str, notes: list[str]
) -> PreTrainedConfig:
    """The configuration of the tower whose weights are inside: the expected one, changed where their shapes differ."""
    wanted = (
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.0.mlp.fc1.weight",
    )
    missing = [key for key in wanted if _TOWER + key not in shapes]
    if missing:
        raise ValueError(f"the weights of mm_vision_tower {name!r} are not those of CLIP or SigLIP: no {missing[0]}")
    patches, positions, feed_forward = (shapes[_TOWER + key] for key in wanted)
    is_clip = f"{_TOWER}embeddings.class_embedding" in shapes
    hidden_size, patch_size, side = patches[0], patches[-1], math.isqrt(positions[0] - is_clip)
    found = {
        "hidden_size": hidden_size,
        "intermediate_size": feed_forward[0],
        "num_hidden_layers": len({key.split(".")[4] for key in shapes if key.startswith(f"{_TOWER}encoder.layers.")}),
        "image_size": patch_size * side,
        "patch_size": patch_size,
    }
    model_type = "clip_vision_model" if is_clip else "siglip_vision_model"
    if expected is not None and (expected.model_type, expected.hidden_size) == (model_type, hidden_size):
        if expected.image_size // expected.patch_size == side:
            found["image_size"] = expected.image_size  # which need not be a multiple of the patch size
        if any(getattr(expected, field) != value for field, value in found.items()):
            expected = type(expected)(**{**expected.to_dict(), **found})
        return expected
    if hidden_size % 64 or not is_clip:
        raise ValueError(
            f"mm_vision_tower {name!r} is neither a folder here nor a known tower of width {hidden_size}, so its "
            "number of attention heads is not known; put a folder of that name with its config.json into the checkpoint"
        )
    heads = hidden_size // 64
    listing = ", ".join(f"{field} {value}" for field, value in found.items())
    notes.append(
        f"mm_vision_tower {name!r} is read from its weights: {listing}, and {heads} attention heads as in CLIP"
    )
    return AutoConfig.for_model(model_type, **found, num_attention_heads=heads)
