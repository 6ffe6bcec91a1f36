"""`stage.json`: what a checkpoint folder is. The folder's name means nothing.

The manifest is written last, and replaced in one step, so a folder that has one is complete: a checkpoint that was
being written when the run was killed has none and is ignored.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from avg_llava.common.machine import library_versions
from avg_llava.common.settings import ConfigError

MANIFEST_NAME = "stage.json"
CHECKPOINT_PREFIX = "checkpoint-"

# Sections and keys that may change between a run and its continuation: they do not change what is learnt.
FREE_KEYS = (
    "logging",
    "output",
    "model.force_start",
    "data.index_dir",
    "data.num_workers",
    "runtime.compile",
    "runtime.gradient_checkpointing",
)


@dataclass(frozen=True)
class StageManifest:
    """Contents of `stage.json`."""

    stage: int
    finished: bool
    """True for the stage's result, False for a checkpoint that training continues from."""
    step: int
    parent: dict[str, Any]
    """Where the run started: `path`, `stage` and `created` of the start, or the two backbones."""
    data_fingerprint: str
    config: dict[str, Any]
    """The resolved configuration."""
    world_size: int
    versions: dict[str, str] = field(default_factory=library_versions)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def write_manifest(folder: Path, manifest: StageManifest) -> None:
    """Write `stage.json` in one step."""
    temporary = folder / f".{MANIFEST_NAME}.new"
    temporary.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / MANIFEST_NAME)


def read_manifest(folder: Path) -> StageManifest | None:
    """The manifest of a folder, or None where there is none.

    Raises:
        ConfigError: a `stage.json` that is not one of this program's.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        return StageManifest(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ConfigError(f"{path} is not a stage manifest: {error}") from error


def check_start(start: str, stage: int, parent_stage: int, force: bool) -> dict[str, Any]:
    """Refuse a start that is not a finished run of the parent stage.

    Args:
        start: `model.start` of the configuration.
        stage: the stage that is to be trained.
        parent_stage: the stage it starts from.
        force: accept anything that can be loaded.

    Returns:
        The `parent` entry of the new manifest.

    Raises:
        ConfigError: the start is something else and `force` is False.
    """
    manifest = read_manifest(Path(start))
    # The time tells a parent that was trained anew from the one that an earlier run started from.
    parent: dict[str, Any] = {"path": start, "stage": None, "created": None}
    if manifest is not None:
        parent |= {"stage": manifest.stage, "created": manifest.created}
    if force or (manifest is not None and manifest.stage == parent_stage and manifest.finished):
        return parent
    if manifest is None:
        problem = "has no stage.json, so it is no checkpoint of this program's training (or is not finished)"
    elif manifest.stage != parent_stage:
        problem = f"holds stage {manifest.stage}"
    else:
        problem = f"is a checkpoint at step {manifest.step} of an unfinished run"
    raise ConfigError(
        f"stage {stage} starts from a finished stage {parent_stage}, but model.start {start} {problem}. Train stage "
        f"{parent_stage} first, name its folder in model.start, or pass --force-start to start from it all the same"
    )


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint of the highest step in a run's folder, or None."""
    steps = {}
    for folder in output_dir.glob(f"{CHECKPOINT_PREFIX}*"):
        number = folder.name.removeprefix(CHECKPOINT_PREFIX)
        if number.isdigit() and (folder / MANIFEST_NAME).is_file():
            steps[int(number)] = folder
    return steps[max(steps)] if steps else None


def changed_keys(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Dotted keys in which two resolved configurations differ, `a.b: 1 -> 2`, those of `FREE_KEYS` apart."""
    changes = []
    before, after = _flatten(earlier), _flatten(now)
    for key in sorted(before.keys() | after.keys()):
        is_free = any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
        if not is_free and before.get(key) != after.get(key):
            changes.append(f"{key}: {before.get(key)} -> {after.get(key)}")
    return changes


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
