"""Converts a checkpoint from any layout that is read to any that is written, tensor by tensor.

Weights keep their bytes unless another data type is asked for. The output replaces what is in its folder when it is
complete and gives the source's logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import CHAT_TEMPLATE_DIR

from avg_llava.checkpoints.checkpoint import ROUTER_KEYS, Checkpoint, rename_keys
from avg_llava.checkpoints.checksums import (
    CHECKSUMS_KEY,
    MANIFEST_NAME,
    checked_chunks,
    compute_checksums,
    recorded_by_folder,
    recorded_checksums,
)
from avg_llava.checkpoints.formats import open_checkpoint
from avg_llava.checkpoints.loading import open_processor
from avg_llava.checkpoints.problems import weight_problems
from avg_llava.checkpoints.same_logits import compare_logits, fits_in_memory
from avg_llava.checkpoints.shards import SINGLE_NAME, PlannedTensor, split_shards, write_shards
from avg_llava.checkpoints.targets import TARGETS, TOWER_KEYS, Model, OutputLayout, Target
from avg_llava.checkpoints.tokenizers import has_tokenizer
from avg_llava.checkpoints.weight_files import CheckpointError, StoredTensor, read_json, stored_tensors
from avg_llava.common.files import write_json
from avg_llava.model.saving import NEW_FOLDER, replaced_model

# Names of weights with a row for each token.
VOCABULARY_KEYS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
# Files of tokenizers, processors and training, which must not stay beside a model in another layout.
OTHER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "preprocessor_config.json", "processor_config.json", "chat_template.*"),
    *(f"{CHAT_TEMPLATE_DIR}/*", MANIFEST_NAME),
)
# Names of values that are computed when a model is built, with which older files are written.
COMPUTED = (".inv_freq", ".position_ids")
_ROWS = 1024  # of a matrix, read at a time


@dataclass(frozen=True)
class Fate:
    """A weight of the source: its name there, in the output (None if dropped), and what else happens to it."""

    key: str
    target: str | None
    note: str = ""


@dataclass(frozen=True)
class Conversion:
    """Plan of a conversion, made from the headers of the source's files.

    Attributes:
        source: The checkpoint that is read.
        target: Name of the output's layout.
        layout: The output's layout.
        fates: One entry per weight of the source.
        shards: Files of the output, with their weights.
    """

    source: Checkpoint
    target: Target
    layout: OutputLayout
    fates: list[Fate]
    shards: dict[str, list[PlannedTensor]]

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        """All weights of the output."""
        return (tensor for tensors in self.shards.values() for tensor in tensors)

    @property
    def num_parameters(self) -> int:
        """Number of weights of the output."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def notes(self) -> tuple[str, ...]:
        """Differences that the user should know."""
        return self.source.notes + self.layout.notes

    @property
    def dtype(self) -> torch.dtype:
        """Data type of most of the output's weights."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + prod(tensor.shape)
        return max(sizes, key=lambda dtype: sizes[dtype])


def plan_conversion(
    path: str | Path, target: Target, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9
) -> Conversion:
    """Plans a conversion; no weight is read.

    Args:
        path: Folder or hub id.
        target: Layout of the output.
        dtype: Data type of the output's weights; None keeps that of each weight.
        max_shard_bytes: Largest size of a file, unless one weight is larger.

    Raises:
        CheckpointError: The source is damaged or does not fit its configuration; all problems are listed.
        ValueError: The layout cannot hold the model.
    """
    source = open_checkpoint(path)
    if problems := weight_problems(source):
        raise CheckpointError(f"{path} cannot be converted ({len(problems)} problems): {'; '.join(problems)}")
    weights = source.stored()
    keys: dict[str, str] = {}  # names in the files
    fates = []
    for part in source.sources:
        stored = stored_tensors(part.resolve())
        ours = rename_keys({key: key for key in stored}, part.renaming)
        for key in stored.keys() - ours.values():
            is_computed = key.endswith(COMPUTED)
            reason = "computed when the model is built" if is_computed else "belongs to no part of the model"
            fates.append(Fate(key, None, f"dropped: {reason}"))
        for name in ours.keys() & keys.keys():
            fates.append(Fate(keys[name], None, f"dropped: {part.resolve().name} replaces it"))
        keys |= ours
    adapted: dict[str, None] = {}
    if source.adapter is not None:
        names = dict.fromkeys([*source.adapter.products, *source.adapter.replaced])
        adapted = rename_keys(names, source.sources[0].renaming)
    if unread := set(source.fresh) - {ROUTER_KEYS}:
        raise ValueError(f"{path} has no {', '.join(unread)}: it cannot be converted, only start a stage of training")
    assert source.folder is not None, "set by every layout"
    assert source.tokenizer is not None, "set by every layout"
    processor = open_processor(source, source.config) if has_tokenizer(source.tokenizer) else None
    has_router = any(name.startswith(ROUTER_KEYS) for name in weights)
    model = Model(source.folder, source.tokenizer, source.config, processor, has_router)
    layout = TARGETS[target](model)
    recorded = recorded_by_folder(part for weight in weights.values() for part in (weight, *weight.parts))
    tensors = []
    for name, weight in weights.items():
        key = keys.get(name, name)
        reasons = [reason for prefix, reason in layout.dropped.items() if name.startswith(prefix)]
        if reasons:
            fates.append(Fate(key, None, f"dropped: {reasons[0]}"))
            continue
        (new_name,) = rename_keys({name: None}, layout.keys)
        num_rows = layout.vocabulary_size if name in VOCABULARY_KEYS else None
        tensor = _planned(new_name, weight, partial(checked_chunks, weight, recorded), dtype, num_rows)
        tensors.append(tensor)
        changes = ["adapters merged"] * (name in adapted) + _changes(weight, tensor)
        fates.append(Fate(key, new_name, ", ".join(changes)))
    return Conversion(
        source, target, layout, sorted(fates, key=lambda fate: fate.key), split_shards(tensors, max_shard_bytes)
    )


def convert(conversion: Conversion, output: Path, *, overwrite: bool = False, check: bool = True) -> float | None:
    """Writes the output of a planned conversion.

    A run that is killed or fails leaves no folder that loads; with `overwrite`, the checkpoint that was there stays
    until the new one is complete. Files that belong to no checkpoint are never touched.

    Args:
        conversion: The plan.
        output: Folder to write.
        overwrite: Replace the checkpoint in a folder that is not empty.
        check: Compare the logits of source and output, unless the memory does not suffice.

    Returns:
        The largest difference of their logits, relative to the largest logit; None if they were not compared.

    Raises:
        CheckpointError: The output gives other logits than the source, a weight differs from its checksum, or it is too
            large for its new data type.
        ValueError: The folder is not empty and `overwrite` is False, or it holds the source.
    """
    if any(output.resolve() in (place, *place.parents) for place in _places(conversion.source)):
        raise ValueError(f"{output} contains the source; name another folder")
    if not overwrite and output.is_dir() and any(entry.name != NEW_FOLDER for entry in output.iterdir()):
        raise ValueError(f"{output} exists and is not an empty folder; name another one, or pass --overwrite")
    difference = None
    with replaced_model(output, OTHER_FILES) as staging:
        write_shards(staging, conversion.shards)
        conversion.layout.write(staging, conversion.dtype)
        tower_folder = conversion.layout.tower_folder
        if tower_folder is not None:
            _write_tower(conversion, staging / tower_folder)
        if conversion.target == "avg":
            _keep_manifest(conversion.source, staging)
        if check and fits_in_memory(conversion.num_parameters):
            is_llava_next = conversion.target == "llava-next"
            difference = compare_logits(conversion.source, staging, is_llava_next, conversion.dtype)
    return difference


def _places(source: Checkpoint) -> Iterator[Path]:
    """Everything that a checkpoint is read from: folders, and the files that links in them lead to."""
    files = source.files()  # an adapter's too
    for place in (source.folder, source.tokenizer, source.image_settings, *files, *(file.parent for file in files)):
        if place is not None:
            yield place.resolve()


def _keep_manifest(source: Checkpoint, folder: Path) -> None:
    """Writes the source's manifest with the checksums of the output, if the source's has some."""
    assert source.folder is not None, "set by every layout"
    manifest = source.folder / MANIFEST_NAME
    if manifest.is_file():
        found = None if recorded_checksums(source.folder) is None else compute_checksums(folder)
        write_json(folder / MANIFEST_NAME, read_json(manifest) | {CHECKSUMS_KEY: found})


def _write_tower(conversion: Conversion, folder: Path) -> None:
    """Writes the vision tower's weights under the names of a tower of its own."""
    (prefix,) = rename_keys({TOWER_KEYS: None}, conversion.layout.keys)
    tower = [
        PlannedTensor("vision_model." + tensor.name.removeprefix(prefix), tensor.dtype, tensor.shape, tensor.parts)
        for tensor in conversion.tensors
        if tensor.name.startswith(prefix)
    ]
    write_shards(folder, {SINGLE_NAME: tower})


def _planned(
    name: str,
    weight: StoredTensor,
    chunks: Callable[[], Iterator[Tensor]],
    dtype: torch.dtype | None,
    num_rows: int | None,
) -> PlannedTensor:
    """The output's tensor of a weight that is read as `chunks`; `num_rows` is the size of the vocabulary if there is a
    row for each token.
    """
    shape = weight.shape if num_rows is None else (num_rows, *weight.shape[1:])
    dtype = dtype if dtype is not None and weight.dtype.is_floating_point else weight.dtype

    def resized() -> Iterator[Tensor]:
        remaining = prod(shape)
        for chunk in chunks():  # to its end, where it is compared with its checksum
            yield chunk[:remaining]
            remaining -= min(remaining, len(chunk))
        if remaining:
            yield _mean_row(weight.read()).expand(shape[0] - weight.shape[0], -1)

    return PlannedTensor(name, dtype, shape, chunks if shape == weight.shape else resized)


def _mean_row(tensor: Tensor) -> Tensor:
    """The mean of the rows, summed in float64 a block of rows at a time."""
    total = torch.zeros(tensor.shape[1], dtype=torch.float64)
    for rows in tensor.split(_ROWS):
        total += rows.sum(0, dtype=torch.float64)
    return (total / len(tensor)).to(tensor.dtype)


def _changes(weight: StoredTensor, tensor: PlannedTensor) -> list[str]:
    changes = []
    if weight.dtype != tensor.dtype:
        changes.append(f"{weight.dtype} -> {tensor.dtype}".replace("torch.", ""))
    if weight.shape != tensor.shape:
        how = "cut" if tensor.shape[0] < weight.shape[0] else "padded with the mean row"
        changes.append(f"{weight.shape[0]} -> {tensor.shape[0]} rows: {how}")
    return changes
