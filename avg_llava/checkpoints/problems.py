"""Problems of a checkpoint that its loading would report, found from the headers of its files, all at once."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from avg_llava.checkpoints.checkpoint import Checkpoint
from avg_llava.checkpoints.checksums import MANIFEST_NAME, compute_checksums, recorded_checksums
from avg_llava.checkpoints.fit import empty_model, foreign_types, misfits
from avg_llava.checkpoints.loading import open_processor
from avg_llava.checkpoints.weight_files import (
    WEIGHT_NAMES,
    CheckpointError,
    StoredTensor,
    list_tensors,
    read_index,
    stored_tensors,
)
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration


def file_problems(folder: Path) -> list[str]:
    """Every file of weights in a folder that is missing or damaged."""
    found = next((name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    names = [found] if found is not None else []
    problems: list[str] = []
    if found is not None and found.endswith(".json"):
        try:
            names = sorted(set(read_index(folder / found).values()))
        except CheckpointError as error:
            return [str(error)]
        problems = [f"{folder / name} is missing, but in {found}" for name in names if not (folder / name).is_file()]
    for name in names:
        if (folder / name).is_file():
            problems += attempt(lambda file=folder / name: list_tensors([file]))  # type: ignore[misc]
    if not problems:
        problems = attempt(lambda: stored_tensors(folder))  # what concerns several files
    return problems


def weight_problems(checkpoint: Checkpoint) -> list[str]:
    """Every weight that is missing, unexpected, or of another shape or type than the configuration says."""
    stored = checkpoint.stored()
    model = empty_model(AvgLlavaForConditionalGeneration, checkpoint, len(stored))
    return misfits(model, stored, checkpoint.fresh) + foreign_types(model, stored)


def tokenizer_problems(checkpoint: Checkpoint) -> list[str]:
    """Problems of the tokenizer and the processor."""
    return attempt(lambda: open_processor(checkpoint, checkpoint.config))


def checksum_problems(folder: Path) -> list[str]:
    """Weights that differ from the checksums in a folder's manifest; reads all weights."""
    recorded = recorded_checksums(folder) or {}
    found = compute_checksums(folder) or {}
    return [
        f"{file}: {name} differs from its checksum in {MANIFEST_NAME}"
        for file, names in recorded.items()
        for name, checksum in names.items()
        if found.get(file, {}).get(name) != checksum
    ]


def non_finite(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, int]]:
    """Names of weights with values that are not finite, and how many; reads all weights, a part at a time."""
    for name, tensor in tensors.items():
        if tensor.dtype.is_floating_point:
            count = sum(int((~part.float().isfinite()).sum()) for part in tensor.chunks())
            if count:
                yield name, count


def attempt(action: Callable[[], object]) -> list[str]:
    """The message of the error that an action raises for users, as a list; empty if there is none."""
    try:
        action()
    except (ValueError, OSError) as error:
        return [" ".join(str(error).split())]
    return []
