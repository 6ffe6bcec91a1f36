"""open_clip models that a vision tower is taken from: known to open_clip by name, on the hub, or in a folder."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import Resampling

from avg_llava.checkpoints.checkpoint import WeightSource
from avg_llava.checkpoints.weight_files import CheckpointError, read_json
from avg_llava.model.open_clip_tower import OpenClipVisionConfig, import_open_clip

PREFIX = "open_clip:"
_HUB = "hf-hub:"
_CONFIG_NAME = "open_clip_config.json"
_WEIGHT_NAMES = tuple(f"open_clip_{stem}" for stem in ("model.safetensors", "pytorch_model.bin", "pytorch_model.pt"))


class _Model(NamedTuple):
    """Description of a model, and a function that gives the file of its weights, downloaded if need be."""

    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    weights: Callable[[], Path]


@dataclass(frozen=True)
class OpenClipSource(WeightSource):
    """The weights of an open_clip model."""

    def resolve(self) -> Path:
        """The file of the weights."""
        return _find_model(self.path).weights()


def is_open_clip(path: str | Path) -> bool:
    """True for `open_clip:...`, and for a folder with open_clip's configuration and without transformers'."""
    folder = Path(path)
    return str(path).startswith(PREFIX) or (
        (folder / _CONFIG_NAME).is_file() and not (folder / "config.json").is_file()
    )


def open_clip_config(path: str | Path) -> OpenClipVisionConfig:
    """The configuration of a model's vision tower and its pixel statistics, without its weights.

    Raises:
        ValueError: There is no such model, or its tower is not open_clip's own vision transformer.
    """
    model, preprocessing, _ = _find_model(path)
    module = import_open_clip(".model")
    try:
        vision = module.CLIPVisionCfg(**model["vision_cfg"])
        # Dropping patches is for contrastive training only; the projector needs all of them.
        fields = dataclasses.asdict(dataclasses.replace(vision, patch_dropout=0.0))
        embed_dim = model["embed_dim"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: open_clip's model configuration is incomplete or unknown ({error})") from error
    statistics = import_open_clip(".transform").PreprocessCfg(
        **{name: preprocessing[name] for name in ("mean", "std", "interpolation") if name in preprocessing}
    )
    return OpenClipVisionConfig(
        vision_cfg=fields,
        embed_dim=embed_dim,
        quick_gelu=bool(preprocessing.get("quick_gelu", model.get("quick_gelu", False))),
        image_mean=list(statistics.mean),
        image_std=list(statistics.std),
        resample=int(Resampling.BILINEAR if statistics.interpolation == "bilinear" else Resampling.BICUBIC),
    )


def _find_model(path: str | Path) -> _Model:
    name = str(path).removeprefix(PREFIX)
    if name.startswith(_HUB):
        return _on_the_hub(name.removeprefix(_HUB))
    if (Path(name) / _CONFIG_NAME).is_file():
        return _in_folder(Path(name))
    return _built_in(name)


def _in_folder(folder: Path) -> _Model:
    def weights() -> Path:
        found = next((folder / name for name in _WEIGHT_NAMES if (folder / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{folder} holds no weights of open_clip, none of {', '.join(_WEIGHT_NAMES)}")
        return found

    return _described(folder / _CONFIG_NAME, weights)


def _on_the_hub(repository: str) -> _Model:
    download = import_open_clip(".pretrained").download_pretrained_from_hf
    try:
        described = Path(download(repository, filename=_CONFIG_NAME))
    except FileNotFoundError as error:
        raise CheckpointError(f"{PREFIX}{_HUB}{repository}: {_one_line(error)}") from error
    return _described(described, lambda: _download(repository, lambda: download(repository)))


def _built_in(name: str) -> _Model:
    """A model that open_clip knows, as `NAME/TAG`: the tag names its weights."""
    open_clip, pretrained = import_open_clip(), import_open_clip(".pretrained")
    model_name, _, tag = name.rpartition("/")
    model = open_clip.get_model_config(model_name) if model_name else None
    if model is None:
        raise CheckpointError(
            f"{PREFIX}{name}: neither a folder with {_CONFIG_NAME}, nor {_HUB}owner/name, nor NAME/TAG of a model that "
            "open_clip.list_pretrained() lists"
        )
    preprocessing = pretrained.get_pretrained_cfg(model_name, tag)
    if not preprocessing:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(model_name))
        raise CheckpointError(
            f"{PREFIX}{name}: open_clip has no weights {tag!r} of {model_name}, only {known or 'none'}"
        )
    # OpenAI's weights need QuickGELU, whether the model's name says so (ViT-L-14-336-quickgelu) or not.
    preprocessing = {"quick_gelu": False, **preprocessing}
    return _Model(model, preprocessing, lambda: _download(name, lambda: pretrained.download_pretrained(preprocessing)))


def _described(file: Path, weights: Callable[[], Path]) -> _Model:
    raw = read_json(file)
    if not isinstance(raw.get("model_cfg"), dict):
        raise CheckpointError(f"{file} has no model_cfg")
    return _Model(raw["model_cfg"], raw.get("preprocess_cfg") or {}, weights)


def _download(name: str, download: Callable[[], str]) -> Path:
    try:
        return Path(download())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{PREFIX}{name}: the weights cannot be downloaded ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
