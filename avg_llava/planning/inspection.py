"""Describes what a folder holds, what it can start, and what is wrong with it; weights stay in their files."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import GENERATION_CONFIG_NAME

from avg_llava.checkpoints.adapters import ADAPTER_CONFIG
from avg_llava.checkpoints.backbones import language_keys, vision_part
from avg_llava.checkpoints.checkpoint import NEWLINE_KEY, Checkpoint, rename_keys
from avg_llava.checkpoints.formats import detect_layout, open_checkpoint
from avg_llava.checkpoints.parts import PROJECTOR_NAME, check_whole
from avg_llava.checkpoints.problems import (
    attempt,
    checksum_problems,
    file_problems,
    non_finite,
    tokenizer_problems,
    weight_problems,
)
from avg_llava.checkpoints.weight_files import StoredTensor, list_tensors, read_config, stored_tensors
from avg_llava.model.towers import TOWERS, find_tower
from avg_llava.training.checkpoint import CHECKPOINT_PREFIX, read_manifest
from avg_llava.training.stages import PART_PREFIXES, STAGES

Kind = Literal["model", "vision tower", "language model", "projector", "adapter", "deepspeed", "run", "data", "unknown"]

_DATA_PEEK = 65536  # bytes of a JSON file in which the first conversation begins


@dataclass
class Inspection:
    """Contents of a folder or a file; fields that do not apply are empty or None.

    Attributes:
        path: The folder or file.
        kind: The sort of thing: a model, one of its backbones or parts, a folder of training or of data.
        layout: The model's layout, a key of `checkpoints.formats.LAYOUTS`.
        stage: `stage`, `finished`, `step`, `created` and `parent` of the stage that wrote it, from its manifest.
        behavior: Variant of the method.
        template: Conversation template that the model was trained with.
        granularities: Levels, coarse to fine.
        has_router: It holds a router's weights.
        vision: `type`, `layers`, `width`, `crop_size` (pixels) and `patch_size` of the vision tower.
        language: `type`, `layers`, `width` and `vocabulary` of the language model.
        max_sequence_length: In tokens.
        parameters: Number of weights by part of the model, and in total.
        dtypes: Number of weights by data type.
        files: `name` and `bytes` of each file.
        has_checksums: The manifest holds checksums of the weights, which `scan` compares.
        starts: Uses that it is ready for.
        notes: Differences from the code that wrote it, and advice.
        problems: Everything that is wrong with it.
    """

    path: str
    kind: Kind = "unknown"
    layout: str | None = None
    stage: dict[str, Any] | None = None
    behavior: str | None = None
    template: str | None = None
    granularities: list[int] = field(default_factory=list)
    has_router: bool | None = None
    vision: dict[str, Any] | None = None
    language: dict[str, Any] | None = None
    max_sequence_length: int | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    has_checksums: bool = False
    starts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def inspect(path: Path, scan: bool = False) -> Inspection:
    """Inspects a folder, or a file of weights; with `scan`, weights are read to find those that are not finite or have
    changed.

    Raises:
        ValueError: There is no such folder or file.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such folder or file")
    found = Inspection(str(path))
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
    found.files = [{"name": file.name, "bytes": file.stat().st_size} for file in files]
    if path.is_file():
        _inspect_file(found, path, scan)
    elif (path / ADAPTER_CONFIG).is_file():
        _inspect_adapter(found, path, scan)
    elif (path / "config.json").is_file():
        _inspect_configured(found, path, scan)
    else:
        _inspect_other(found, path)
    if found.problems:
        found.starts = []
    return found


def _inspect_file(found: Inspection, file: Path, scan: bool) -> None:
    found.problems += attempt(lambda: _count(found, list_tensors([file]), scan))
    if not found.problems and any("mm_projector." in name for name in list_tensors([file])):
        found.kind, found.starts = "projector", ["stage 1 or 2, as model.projector"]
    elif not found.problems:
        found.notes.append("weights alone; inspect their folder")


def _inspect_adapter(found: Inspection, folder: Path, scan: bool) -> None:
    """A LoRA folder of peft, of the original code or of this package, described with its base model."""
    found.kind = "adapter"
    try:
        checkpoint = open_checkpoint(folder)
    except (ValueError, OSError) as error:
        found.problems.append(str(error))
        return
    assert checkpoint.adapter is not None, "the folder holds its configuration"
    found.notes.append(f"described is the model that it makes of {checkpoint.adapter.base}")
    found.problems += attempt(lambda: _inspect_model(found, checkpoint, scan))


def _inspect_configured(found: Inspection, folder: Path, scan: bool) -> None:
    """A folder with a `config.json`: a model or a backbone."""
    try:
        raw = read_config(folder)
    except ValueError as error:
        found.problems.append(str(error))
        return
    found.problems += attempt(lambda: _add_stage(found, folder))
    if scan and found.has_checksums:
        found.problems += attempt(lambda: found.problems.extend(checksum_problems(folder)))
    try:
        found.layout = detect_layout(raw, folder)
    except (ValueError, TypeError) as error:
        _inspect_backbone(found, folder, raw, str(error), scan)
        return
    found.kind = "model"
    found.problems += attempt(lambda: check_whole(folder)) or file_problems(folder)
    try:
        checkpoint = open_checkpoint(folder)
    except (ValueError, OSError) as error:
        if not found.problems:  # else it is one of them
            found.problems.append(str(error))
        return
    if found.problems:
        _describe(found, checkpoint)
    else:
        found.problems += attempt(lambda: _inspect_model(found, checkpoint, scan))


def _inspect_model(found: Inspection, checkpoint: Checkpoint, scan: bool) -> None:
    """A model whose files are whole."""
    _describe(found, checkpoint)
    stored = checkpoint.stored()
    found.has_router = any(name.startswith(PART_PREFIXES["router"]) for name in stored)
    _count(found, stored, scan)
    found.problems += weight_problems(checkpoint) + tokenizer_problems(checkpoint)
    assert checkpoint.folder is not None, "set by every layout"
    if (checkpoint.folder / GENERATION_CONFIG_NAME).is_file():
        found.problems += attempt(lambda: GenerationConfig.from_pretrained(checkpoint.folder))
    found.starts = _starts(found, checkpoint)


def _inspect_backbone(found: Inspection, folder: Path, raw: Mapping[str, Any], problem: str, scan: bool) -> None:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        found.problems += [problem, " ".join(str(error).split())]
        return
    found.problems += file_problems(folder)
    if vision_part(config).model_type in TOWERS:
        found.kind = "vision tower"
        found.vision, renaming = _vision(vision_part(config)), find_tower(vision_part(config)).keys
    elif config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found.kind = "language model"
        found.language, renaming = _language(config), language_keys(config)
    else:
        found.problems.append(problem)
    if not found.problems:
        _count(found, rename_keys(stored_tensors(folder), renaming), scan)
        found.starts = [f"stage 1, as model.{'vision' if found.kind == 'vision tower' else 'language'}"]


def _inspect_other(found: Inspection, folder: Path) -> None:
    """A folder without `config.json`."""
    checkpoints = sorted(entry.name for entry in folder.glob(f"{CHECKPOINT_PREFIX}*") if entry.is_dir())
    steps = sorted(entry.name for entry in folder.glob("global_step*") if entry.is_dir())
    if checkpoints:
        found.kind = "run"
        found.notes.append(f"a training run that is not finished; inspect its checkpoints: {', '.join(checkpoints)}")
    elif steps:
        found.kind = "deepspeed"
        found.problems += attempt(lambda: check_whole(folder))
    elif (projector := folder / PROJECTOR_NAME).is_file():
        _inspect_file(found, projector, scan=False)
    elif data := [file for file in sorted(folder.iterdir()) if _has_conversations(file)]:
        found.kind = "data"
        found.starts = [f"data.sources of a stage: {file.name}" for file in data]
    else:
        found.problems.append(f"{folder} holds no config.json, so it is not a model folder, and no conversations")


def _add_stage(found: Inspection, folder: Path) -> None:
    manifest = read_manifest(folder)
    if manifest is None:
        return
    found.has_checksums = manifest.weights is not None
    found.stage = {key: getattr(manifest, key) for key in ("stage", "finished", "step", "created", "parent")}


def _describe(found: Inspection, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    found.behavior, found.template = config.behavior, config.template
    found.granularities = list(config.granularities)
    found.vision, found.language = _vision(config.vision_config), _language(config.text_config)
    found.max_sequence_length = config.max_sequence_length
    found.notes += checkpoint.notes


def _vision(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "type": config.model_type,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "crop_size": find_tower(config).crop_size(config),
        "patch_size": config.patch_size,
    }


def _language(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "type": config.model_type,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
    }


def _count(found: Inspection, stored: Mapping[str, StoredTensor], scan: bool) -> None:
    """Counts weights by part and by data type, and with `scan` those that are not finite."""
    parts = dict.fromkeys(PART_PREFIXES, 0)
    dtypes: Counter[str] = Counter()
    for name, tensor in stored.items():
        number = tensor.num_bytes // tensor.dtype.itemsize
        part = next((part for part, prefixes in PART_PREFIXES.items() if name.startswith(prefixes)), None)
        if part is not None:
            parts[part] += number
        dtypes[str(tensor.dtype).removeprefix("torch.")] += number
    found.parameters = {part: number for part, number in parts.items() if number} | {"total": dtypes.total()}
    found.dtypes = dict(dtypes)
    if scan:
        found.problems += [f"{name}: {count} values are not finite" for name, count in non_finite(stored)]


def _starts(found: Inspection, checkpoint: Checkpoint) -> list[str]:
    stage = found.stage
    if stage is not None and not stage["finished"]:
        return [f"its stage {stage['stage']} again, from step {stage['step']}"]
    if stage is not None:
        starts = [f"stage {number}" for number, spec in STAGES.items() if spec.parent == stage["stage"]]
    else:
        numbers: tuple[int, ...] = (3,)
        if NEWLINE_KEY in checkpoint.fresh:  # LLaVA-1.5, without tiles
            numbers = (2, 3)
        elif found.has_router:
            numbers = (3, 4)
        elif found.behavior == "released":  # AVG-LLaVA of stage 3
            numbers = (4,)
        starts = [f"stage {number} with --force-start" for number in numbers]
    is_routed = found.has_router and (stage is None or "router" in STAGES[stage["stage"]].trains)
    levels = "routed, or at one level" if is_routed else "at one level (--granularity), as it has no trained router"
    return [*starts, f"inference {levels}"]


def _has_conversations(file: Path) -> bool:
    """Returns True if a file looks like records in LLaVA's format."""
    if file.suffix == ".parquet":
        return "conversations" in pq.read_schema(file).names
    if file.suffix not in (".json", ".jsonl"):
        return False
    with file.open("rb") as stream:
        return b'"conversations"' in stream.read(_DATA_PEEK)
