"""Building and loading models: from backbones, from original-format LLaVA files, from transformers-format folders.

What a folder holds is decided by its `config.json` and its keys, never by its name.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from avg_llava.checkpoints.quantization import Quantization, compute_in, quantization_arguments
from avg_llava.checkpoints.weight_files import CheckpointError, StoredTensor, list_tensors, weight_files
from avg_llava.model.attention import pick_attention
from avg_llava.model.configuration import AvgLlavaConfig, Behavior, RouterConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.processing import AvgLlavaProcessor

ORIGINAL_PREFIX = "llava_"  # model types of the original code: llava_llama, llava_mistral, ...

TensorT = TypeVar("TensorT")

# Key renamings to this package's names (pattern, replacement); first match wins, None drops the key.
Renaming = list[tuple[str, str | None]]
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
VISION_KEYS: Renaming = [
    (r"^.*\.position_ids$", None),
    (r"^(text_model\.|text_projection|visual_projection|logit_scale).*$", None),
    (r"^(?:vision_model\.)?", "model.vision_tower."),
]
LANGUAGE_KEYS: Renaming = [
    (r"^.*rotary_emb\.inv_freq$", None),
    (r"^model\.", "model.language_model."),
    (r"^lm_head\.", "lm_head."),
]
# What transformers makes of this package's names in some of the files that it saves.
SAVED_KEYS: Renaming = [
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", r"model.\1"),
]
ROUTER_KEYS = "model.router."

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


def load(path: str | Path, **kwargs: Any) -> tuple[AvgLlavaForConditionalGeneration, AvgLlavaProcessor]:
    """Loads a model and its processor; arguments as for :func:`load_model`."""
    model = load_model(path, **kwargs)
    return model, AvgLlavaProcessor.from_checkpoint(resolve_folder(path), model.config)


def load_model(
    path: str | Path,
    *,
    behavior: Behavior | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantization: Quantization | None = None,
    static_cache: bool = False,
) -> AvgLlavaForConditionalGeneration:
    """Loads a model in evaluation mode from a local folder or a hub id.

    Takes original-format LLaVA-NeXT and AVG-LLaVA folders, transformers-format LLaVA-NeXT folders (a fresh router is
    added), and AVG-LLaVA folders saved by this package. No tokenizer is needed. Attention is FlashAttention on a GPU in
    half precision where flash-attn is installed, and SDPA elsewhere.

    Args:
        path: Folder with `config.json` and safetensors files, or a hub id.
        behavior: "paper" or "released"; None takes what the checkpoint says. Original-format files with a router were
            trained as "released", everything else defaults to "paper".
        dtype: Data type of the weights; None keeps the checkpoint's.
        device: Where to put the model; None leaves it on the CPU.
        quantization: "8bit" or "4bit" for the language model's blocks; see :mod:`avg_llava.checkpoints.quantization`.
        static_cache: Whether answers are written with a key-value cache of fixed size, with which transformers compiles
            the step of a token on a GPU. Takes minutes at first; answers are the same.

    Raises:
        CheckpointError: keys are missing, unexpected or of the wrong shape; all are listed.
        ValueError: the folder is none of the known kinds, or the weights cannot be quantised here.
    """
    folder = resolve_folder(path)
    quantizing = {} if quantization is None else quantization_arguments(quantization, device)
    raw_config = read_config(folder)
    model_type = str(raw_config.get("model_type"))
    if model_type.startswith(ORIGINAL_PREFIX) and model_type != "llava_next":
        tensors = rename_keys(read_tensors(folder), ORIGINAL_KEYS)
        config = config_from_original(raw_config, folder, behavior, has_router=_has_router(tensors))
        if not any(key.startswith("model.vision_tower.") for key in tensors):
            tower = raw_config["mm_vision_tower"]
            tensors |= rename_keys(read_tensors(resolve_folder(tower, folder)), VISION_KEYS)
        model = model_from_tensors(config, tensors, dtype, source=str(path), **quantizing)
    elif model_type in ("llava_next", AvgLlavaConfig.model_type):
        config = config_from_transformers(raw_config, behavior)
        model, info = AvgLlavaForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **quantizing,
        )
        check_loaded(info, str(path), fresh=(ROUTER_KEYS,) if model_type == "llava_next" else ())
    else:
        raise ValueError(
            f"{folder / 'config.json'}: model_type {model_type!r} is neither an original LLaVA-NeXT checkpoint "
            f"(llava_llama, ...), nor 'llava_next', nor '{AvgLlavaConfig.model_type}'"
        )
    if quantization is not None:
        compute_in(model, model.dtype)
    elif device is not None:
        model = model.to(device)
    attention = pick_attention(model.device, model.dtype, is_flash_attn_2_available())
    if attention != "sdpa":  # which transformers takes by itself
        model.set_attn_implementation({"text_config": attention, "vision_config": attention})
    if static_cache:
        model.generation_config.cache_implementation = "static"
    return model.eval()


def build_from_backbones(
    vision_path: str | Path,
    language_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    **config_fields: Any,
) -> AvgLlavaForConditionalGeneration:
    """Stage 1's start: a pretrained CLIP tower and a pretrained causal LM, with projector, newline and router fresh.

    Args:
        vision_path: Folder or hub id of a CLIP model (a bare vision tower or the whole of it).
        language_path: Folder or hub id of a causal language model.
        dtype: Data type of the weights; None keeps the language model's.
        **config_fields: Further fields of :class:`AvgLlavaConfig`, such as `granularities` or `behavior`.
    """
    config = config_from_backbones(vision_path, language_path, **config_fields)
    vision_folder, language_folder = resolve_folder(vision_path), resolve_folder(language_path)
    tensors = rename_keys(read_tensors(vision_folder), VISION_KEYS)
    tensors |= rename_keys(read_tensors(language_folder), LANGUAGE_KEYS)
    fresh = (ROUTER_KEYS, "model.multi_modal_projector.", "model.image_newline")
    return model_from_tensors(config, tensors, dtype, source=f"{vision_path} + {language_path}", fresh=fresh)


def config_from_backbones(vision_path: str | Path, language_path: str | Path, **config_fields: Any) -> AvgLlavaConfig:
    """The configuration of stage 1's start; arguments as for :func:`build_from_backbones`."""
    vision_folder, language_folder = resolve_folder(vision_path), resolve_folder(language_path)
    vision_config = AutoConfig.from_pretrained(vision_folder)
    text_config = AutoConfig.from_pretrained(language_folder)
    return AvgLlavaConfig(
        vision_config=_vision_part(vision_config),
        text_config=text_config,
        image_token_index=text_config.vocab_size,
        tie_word_embeddings=text_config.tie_word_embeddings,
        **config_fields,
    )


def model_from_tensors(
    config: AvgLlavaConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | str | None = None,
    *,
    source: str,
    fresh: Iterable[str] = (ROUTER_KEYS,),
    **kwargs: Any,
) -> AvgLlavaForConditionalGeneration:
    """Builds a model from tensors under this package's key names.

    Args:
        config: The model's configuration.
        tensors: All weights; parts named by `fresh` may be missing as a whole and are then initialised.
        dtype: Data type of the weights; None takes that of the tensors.
        source: Where the tensors come from, for the error message.
        fresh: Key prefixes of parts that may be missing.
        **kwargs: Passed on to `from_pretrained`.

    Raises:
        CheckpointError: keys are missing, unexpected or of the wrong shape; all are listed.
    """
    if dtype is None:
        dtype = tensors["model.language_model.embed_tokens.weight"].dtype
    model, info = AvgLlavaForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **kwargs,
    )
    present = [prefix for prefix in fresh if not any(key.startswith(prefix) for key in tensors)]
    check_loaded(info, source, tuple(present))
    return model.eval()


def load_model_config(path: str | Path) -> AvgLlavaConfig:
    """The configuration that :func:`load_model` would give the model of a folder or hub id, without its weights."""
    folder = resolve_folder(path)
    raw = read_config(folder)
    if str(raw.get("model_type")).startswith(ORIGINAL_PREFIX) and raw["model_type"] != "llava_next":
        return config_from_original(raw, folder, has_router=_has_router(list_tensors(weight_files(folder))))
    return config_from_transformers(raw)


def config_from_original(
    raw: Mapping[str, Any], folder: Path, behavior: Behavior | None = None, has_router: bool = True
) -> AvgLlavaConfig:
    """Translates the flat `config.json` of the original code.

    Its pinpoints are (width, height); they become (height, width) in the same order, which keeps its way with ties.
    """
    for key, known in {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}.items():
        if raw.get(key) != known:
            raise ValueError(f"{folder / 'config.json'}: {key} is {raw.get(key)!r}; only {known!r} is supported")
    text_type = str(raw["model_type"]).removeprefix(ORIGINAL_PREFIX)
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
    )


def config_from_transformers(raw: Mapping[str, Any], behavior: Behavior | None = None) -> AvgLlavaConfig:
    """Reads the `config.json` of a LLaVA-NeXT or AVG-LLaVA folder in transformers' format."""
    fields = {key: value for key, value in raw.items() if key not in ("model_type", "architectures")}
    if behavior is not None:
        fields["behavior"] = behavior
    return AvgLlavaConfig(**fields)


def resolve_folder(path: str | Path, relative_to: Path | None = None) -> Path:
    """A local folder for `path`: itself, or one relative to `relative_to`, or a download of the hub id."""
    candidates = [Path(path).expanduser()]
    if relative_to is not None:
        candidates.insert(0, relative_to / path)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"{path}: no such folder, and not a hub id of the form owner/name")
    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    return Path(snapshot_download(str(path), allow_patterns=patterns))


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json, so it is not a model folder")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return raw


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files (an index, or a single file). Pickled files are not read."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} cannot be read ({error}); it may be cut short") from error
    return tensors


def list_weights(folder: Path) -> dict[str, StoredTensor]:
    """Where the weights of a checkpoint of this package are, under this package's names."""
    return rename_keys(list_tensors(weight_files(folder)), SAVED_KEYS)


def rename_keys(tensors: Mapping[str, TensorT], renaming: Renaming) -> dict[str, TensorT]:
    """Renames keys by the first pattern that matches; keys that no pattern matches stay as they are."""
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, replacement in renaming:
            if re.search(pattern, key):
                if replacement is not None:
                    renamed[re.sub(pattern, replacement, key, count=1)] = tensor
                break
        else:
            renamed[key] = tensor
    return renamed


def _tower_config(name: str, folder: Path) -> PreTrainedConfig:
    if name in KNOWN_TOWERS and not (folder / name).is_dir():
        return CLIPVisionConfig(**KNOWN_TOWERS[name])
    return _vision_part(AutoConfig.from_pretrained(resolve_folder(name, folder)))


def _vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision tower's own configuration, where `config` may be that of a whole CLIP model."""
    return config.vision_config if "vision_config" in config.sub_configs else config


def _has_router(tensors: Iterable[str]) -> bool:
    return any(key.startswith(ROUTER_KEYS) for key in tensors)


def check_loaded(info: Mapping[str, Any], source: str, fresh: tuple[str, ...] = ()) -> None:
    """Turns transformers' loading report into one error."""
    problems = [f"missing    {key}" for key in sorted(info["missing_keys"]) if not key.startswith(fresh)]
    problems += [f"unexpected {key}" for key in sorted(info["unexpected_keys"])]
    problems += [
        f"shape      {key}: {tuple(found)} in the checkpoint, {tuple(wanted)} in the model"
        for key, found, wanted in sorted(info["mismatched_keys"])
    ]
    if problems:
        listing = "\n  ".join(problems)
        raise CheckpointError(f"{source} does not fit its configuration ({len(problems)} keys):\n  {listing}")


__all__ = ["CheckpointError", "build_from_backbones", "load", "load_model"]
