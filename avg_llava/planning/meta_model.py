"""The model of a run without its weights: its configuration, and the model on the meta device.

A start that does not exist yet has the shape that the configuration of its stage gives it, and so on back to the
backbones of stage 1. The shapes of the backbones and starts in the shipped configurations are included.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig

from avg_llava.checkpoints.backbones import config_from_backbones, join_configs, vision_part
from avg_llava.checkpoints.loading import load_model_config
from avg_llava.checkpoints.open_clip_models import is_open_clip, open_clip_config
from avg_llava.checkpoints.original import KNOWN_TOWERS
from avg_llava.checkpoints.routing_model import RoutingModel
from avg_llava.common.settings import ConfigError, read_yaml
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.training.assembly import adapt
from avg_llava.training.config import TrainConfig, load_config
from avg_llava.training.lora import add_adapters
from avg_llava.training.stages import STAGES, set_trainable

_CLIP, _SIGLIP = "openai/clip-vit-large-patch14-336", "google/siglip2-so400m-patch14-384"
_VICUNA, _QWEN = "lmsys/vicuna-7b-v1.5", "Qwen/Qwen3-4B"
_MISTRAL, _LLAMA = "mistralai/Mistral-7B-Instruct-v0.2", "meta-llama/Meta-Llama-3-8B-Instruct"
_SEVEN_B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}

# Published shapes, as fields of the configuration of a `model_type`.
KNOWN_BACKBONES: dict[str, dict[str, Any]] = {
    _CLIP: KNOWN_TOWERS[_CLIP],
    _SIGLIP: KNOWN_TOWERS["google/siglip-so400m-patch14-384"],
    _VICUNA: {"model_type": "llama", "vocab_size": 32_000, "intermediate_size": 11_008, **_SEVEN_B},
    _MISTRAL: {
        "model_type": "mistral",
        "vocab_size": 32_000,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        **_SEVEN_B,
    },
    _LLAMA: {
        "model_type": "llama",
        "vocab_size": 128_256,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        **_SEVEN_B,
    },
    _QWEN: {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    },
}
KNOWN_STARTS: dict[str, tuple[str, str, int]] = {
    "Lin-Chen/open-llava-next-vicuna-7b": (_CLIP, _VICUNA, 32_000),
    "liuhaotian/llava-v1.6-vicuna-7b": (_CLIP, _VICUNA, 32_000),
    "liuhaotian/llava-v1.6-mistral-7b": (_CLIP, _MISTRAL, 32_000),
    "lmms-lab/llama3-llava-next-8b": (_CLIP, _LLAMA, 128_256),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (_CLIP, _VICUNA, 32_064),
    "llava-hf/llava-v1.6-mistral-7b-hf": (_CLIP, _MISTRAL, 32_064),
    "llava-hf/llama3-llava-next-8b-hf": (_CLIP, _LLAMA, 128_320),
}
"""Vision tower, language model and vocabulary (which transformers' layout pads) of published LLaVA-NeXT models."""


def find_model_config(
    config: TrainConfig, path: Path, model_of: Path | None = None
) -> tuple[AvgLlavaConfig, list[str]]:
    """Finds the configuration of the model that a run starts from, without reading or downloading weights.

    Args:
        path: The file of `config`; those of earlier stages are searched for in its folder, the parent folder and
            sibling folders.
        model_of: File of the stage that produces the start, if it is elsewhere.

    Returns:
        The configuration, and the assumptions made to find it, in words.

    Raises:
        ConfigError: The start does not exist and no file describes how it is made.
    """
    start = config.model.start
    if start is None:
        assert config.model.vision is not None, "checked by TrainConfig"
        assert config.model.language is not None, "checked by TrainConfig"
        return _from_backbones(config.model.vision, config.model.language, config.architecture())
    assumptions: list[str] = []
    source = model_of or _find_producer(start, path)
    folder = _local_folder(start)
    if folder is not None:
        found = load_model_config(folder)
    elif source is not None:
        found, assumptions = find_model_config(load_config(source), source)
        assumptions.insert(0, f"{start} does not exist; its shape follows from {source}")
    elif start in KNOWN_STARTS:
        vision, language, vocabulary = KNOWN_STARTS[start]
        found, _ = _from_backbones(vision, language, {})
        found.text_config.vocab_size = vocabulary
        assumptions = [f"{start} has its published shape"]
    else:
        raise ConfigError(
            f"model.start {start} is neither a folder nor a downloaded hub repository, and no YAML file near {path} "
            "has it as output.dir; download it, or name the file of the stage that produces it, or of stage 1, with "
            "--model-of"
        )
    adapt(found, config.model)
    return found, assumptions


def meta_model(config: TrainConfig, model_config: AvgLlavaConfig) -> AvgLlavaForConditionalGeneration:
    """The model of a run on the meta device, with `requires_grad` set for the stage.

    With a feedback store, stage 4 has no language model.
    """
    kind = AvgLlavaForConditionalGeneration if config.objective.feedback_store is None else RoutingModel
    with torch.device("meta"):
        model = kind(model_config)
        if config.lora is not None:
            add_adapters(model, config.lora, config.seed)
    set_trainable(model, STAGES[config.stage])
    return model


def _local_folder(path: str) -> Path | None:
    """A folder, or the copy on this machine of a hub repository; None if there is none."""
    if Path(path).is_dir():
        return Path(path)
    name, _, revision = path.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):  # ValueError: no hub id
        return None


def _find_producer(start: str, path: Path) -> Path | None:
    """The YAML file whose `output.dir` is `start`, in the folder of `path`, its parent or a sibling folder."""
    above = path.parent.parent
    searched = (path.parent.glob("*.yaml"), above.glob("*.yaml"), above.glob("*/*.yaml"))
    for candidate in (file for files in searched for file in sorted(files)):
        try:
            output = read_yaml(candidate).get("output")
        except ConfigError:
            continue  # a data mixture, or another file that configures no run
        if isinstance(output, dict) and output.get("dir") == start and candidate.resolve() != path.resolve():
            return candidate
    return None


def _from_backbones(vision: str, language: str, fields: dict[str, Any]) -> tuple[AvgLlavaConfig, list[str]]:
    """The configuration of a model of two backbones with further `fields`, and the assumptions."""
    if Path(vision).is_dir() and Path(language).is_dir():
        return config_from_backbones(vision, language, **fields), []
    parts, assumptions = [], []
    for name in (vision, language):
        if not Path(name).is_dir() and name in KNOWN_BACKBONES:
            parts.append(AutoConfig.for_model(**KNOWN_BACKBONES[name]))
            assumptions.append(f"{name} has its published shape")
            continue
        if is_open_clip(name):
            parts.append(open_clip_config(name))
            continue
        try:
            parts.append(AutoConfig.from_pretrained(name, trust_remote_code=False))  # of a hub id, only config.json
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{name} is no folder of a model, and cannot be had from the hub ({reason})") from error
    tower, text = parts
    return join_configs(vision_part(tower), text, **fields), assumptions
