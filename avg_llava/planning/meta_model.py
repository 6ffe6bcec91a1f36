"""The model of a run without its weights: its configuration, and the model on the meta device.

A start that does not exist yet has the shape that the configuration of its stage gives it, and so on back to the
backbones of stage 1. The shapes of the backbones in the shipped configurations are included.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PreTrainedConfig

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

KNOWN_LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
}


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
    if config.model.start is None:
        return _from_backbones(config)
    assumptions: list[str] = []
    if Path(config.model.start).is_dir():
        found = load_model_config(config.model.start)
    else:
        source = model_of or _find_producer(config.model.start, path)
        if source is None:
            raise ConfigError(
                f"model.start {config.model.start} is not a folder, and no YAML file near {path} has it as "
                "output.dir; name the file of the stage that produces it, or of stage 1, with --model-of"
            )
        found, assumptions = find_model_config(load_config(source), source)
        assumptions.insert(0, f"{config.model.start} does not exist; its shape follows from {source}")
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


def _from_backbones(config: TrainConfig) -> tuple[AvgLlavaConfig, list[str]]:
    vision, language = config.model.vision, config.model.language
    assert vision is not None, "checked by TrainConfig"
    assert language is not None, "checked by TrainConfig"
    if Path(vision).is_dir() and Path(language).is_dir():
        return config_from_backbones(vision, language, **config.architecture()), []
    assumptions = []
    parts: dict[str, PreTrainedConfig] = {}
    known = {
        "vision": (vision, KNOWN_TOWERS, CLIPVisionConfig),
        "language": (language, KNOWN_LANGUAGE_MODELS, LlamaConfig),
    }
    for part, (name, shapes, kind) in known.items():
        if is_open_clip(name):
            parts[part] = open_clip_config(name)
        elif Path(name).is_dir() or name not in shapes:
            # For a hub id, only config.json is downloaded.
            parts[part] = AutoConfig.from_pretrained(name, trust_remote_code=False)
        else:
            parts[part] = kind(**shapes[name])
            assumptions.append(f"{name} has its published shape")
    built = join_configs(vision_part(parts["vision"]), parts["language"], **config.architecture())
    return built, assumptions
