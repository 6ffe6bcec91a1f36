"""Folders and files that hold less than a model: a projector, adapters of a base model, shards that DeepSpeed left."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from avg_llava.checkpoints.adapters import ADAPTER_CONFIG, read_adapter
from avg_llava.checkpoints.checkpoint import Checkpoint, Renaming, WeightSource, rename_keys, tokenizer_folder
from avg_llava.checkpoints.original import ORIGINAL_KEYS, open_original
from avg_llava.checkpoints.weight_files import (
    WEIGHT_NAMES,
    CheckpointError,
    read_config,
    resolve_folder,
    stored_tensors,
)
from avg_llava.model.configuration import Behavior

PROJECTOR_NAME = "mm_projector.bin"
_PROJECTOR = "model.multi_modal_projector."
_PROJECTOR_KEYS: Renaming = [
    (r"^(?:.*\.)?mm_projector\.0\.", f"{_PROJECTOR}linear_1."),
    (r"^(?:.*\.)?mm_projector\.2\.", f"{_PROJECTOR}linear_2."),
    (r"^(?:.*\.)?multi_modal_projector\.", _PROJECTOR),
]
# Weights beside adapters that were trained whole: the original code's, with peft's prefixes, and this package's.
_TRAINED_WHOLE: dict[str, Renaming] = {
    "non_lora_trainables.bin": [
        (r"^(?:base_model\.)?(?:model\.)?" + pattern.removeprefix("^"), name) for pattern, name in ORIGINAL_KEYS
    ],
    "other_parts.safetensors": [],
}


def check_whole(folder: Path) -> None:
    """Raises a CheckpointError that says what to do if a folder holds a part of a model, and no adapters."""
    if any((folder / name).is_file() for name in (*WEIGHT_NAMES, ADAPTER_CONFIG)):
        return
    shards = sorted(path.name for path in folder.glob("global_step*"))
    if shards:
        raise CheckpointError(
            f"{folder} holds only DeepSpeed's shards ({shards[-1]}); make it whole with `python -m "
            f"deepspeed.utils.zero_to_fp32 --safe_serialization {folder} {folder}`"
        )
    if (folder / PROJECTOR_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds only a projector; give stage 1 or 2 its backbones and model.projector: "
            f"{folder / PROJECTOR_NAME}"
        )


def with_projector(checkpoint: Checkpoint, path: str | Path) -> Checkpoint:
    """A checkpoint with another projector.

    Args:
        checkpoint: The rest of the model.
        path: File of the projector's weights, or a folder or hub id with `mm_projector.bin`: the result of a stage 1 of
            the original code. What comes before `mm_projector.` in the names of its weights does not matter.

    Raises:
        CheckpointError: The file holds something else than a projector of two layers.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        file = resolve_folder(path) / PROJECTOR_NAME
    if not file.is_file():
        raise CheckpointError(f"model.projector {path} is no file, and no folder with {PROJECTOR_NAME}")
    wanted = {f"{_PROJECTOR}{layer}.{kind}" for layer in ("linear_1", "linear_2") for kind in ("weight", "bias")}
    stored = stored_tensors(file)
    if different := rename_keys(stored, _PROJECTOR_KEYS).keys() ^ wanted:
        raise CheckpointError(
            f"{file} does not hold exactly the weights of a projector of two layers (mlp2x_gelu); missing or unknown: "
            f"{', '.join(sorted(different))}"
        )
    fresh = tuple(prefix for prefix in checkpoint.fresh if prefix != _PROJECTOR)
    source = WeightSource(file, _PROJECTOR_KEYS)
    return replace(checkpoint, sources=(*checkpoint.sources, source), fresh=fresh)


def open_adapter(
    name: str, folder: Path, open_base: Callable[[str | Path, Behavior | None], Checkpoint], behavior: Behavior | None
) -> Checkpoint | None:
    """The model that adapters in a folder make of their base model, or None if the folder holds none.

    Adapters of the original code bring the configuration of the whole model and the weights that were trained whole
    along; their base may be a plain language model. Those of peft, and of this package's training, belong to a model.

    Args:
        name: Path or hub id, for messages.
        folder: The folder.
        open_base: Describes the base model.
        behavior: As for `open_checkpoint`.

    Raises:
        CheckpointError: Adapters and base model do not fit.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    adapter = read_adapter(folder)
    try:
        base_folder = resolve_folder(adapter.base, relative_to=folder)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path {error}; write its folder or hub id there"
        ) from error
    if (base_folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: the base model {adapter.base} is made of adapters itself; merge them first"
        )
    added = tuple(
        WeightSource(folder / file, renaming) for file, renaming in _TRAINED_WHOLE.items() if (folder / file).is_file()
    )
    raw_config = read_config(folder) if (folder / "config.json").is_file() else {}
    if "mm_vision_tower" in raw_config:
        sources = (WeightSource(base_folder, ORIGINAL_KEYS), *added)
        checkpoint = open_original(name, folder, raw_config, behavior, sources)
    else:
        base = open_base(base_folder, behavior)
        checkpoint = replace(base, name=name, sources=(*base.sources, *added))
    return replace(checkpoint, adapter=adapter, tokenizer=tokenizer_folder(folder, checkpoint.tokenizer or base_folder))
