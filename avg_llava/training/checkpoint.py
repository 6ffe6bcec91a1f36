"""Checkpoint folders: what one holds (`stage.json`), finding, checking, writing and converting it.

A checkpoint is defined by its manifest, `stage.json`; the folder's name means nothing. The manifest is written last and
in one step, so a folder that has one is complete: a checkpoint that was being written when the run was killed has none
and is ignored.
"""

import dataclasses
import json
import logging
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from avg_llava.checkpoints.checksums import MANIFEST_NAME, Checksums
from avg_llava.common.files import write_json
from avg_llava.common.machine import library_versions
from avg_llava.common.settings import ConfigError, build
from avg_llava.training.config import TrainConfig
from avg_llava.training.processes import rank
from avg_llava.training.stages import STAGES, num_weights

logger = logging.getLogger(__name__)

CHECKPOINT_PREFIX = "checkpoint-"

# Sections and keys that may change between a run and its continuation: they do not affect what is learned.
FREE_KEYS = (
    "logging",
    "output",
    "model.force_start",
    "data.index_dir",
    "data.num_workers",
    "data.force_template",
    "data.sources.license",
    "runtime.compile",
    "runtime.gradient_checkpointing",
)

# Bytes per trained parameter: DeepSpeed's float32 master copy, Adam's two float32 moments.
MASTER_WEIGHT_BYTES, MOMENT_BYTES = 4, 8

# DeepSpeed settings that load a checkpoint in the universal format.
LOAD_UNIVERSAL: dict[str, Any] = {"checkpoint": {"load_universal": True}}
_UNIVERSAL_DONE, _POLL_SECONDS = "universal.done", 0.2


class SaveError(ValueError):
    """A checkpoint or a result cannot be written; the message says how to make room."""


@dataclass(frozen=True)
class StageManifest:
    """Contents of `stage.json`."""

    stage: int
    finished: bool
    """True for the stage's result, False for a checkpoint that training continues from."""
    step: int
    """Optimizer steps taken."""
    parent: dict[str, Any]
    """Start of the run: `path`, `stage` and `created` of its checkpoint, or the two backbones."""
    data_fingerprint: str
    config: dict[str, Any]
    """The resolved configuration."""
    world_size: int
    samples: list[int] = field(default_factory=list)
    """Samples of each of `data.sources` in an epoch; empty in manifests of earlier versions."""
    versions: dict[str, str] = field(default_factory=library_versions)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    weights: Checksums | None = None
    """Checksums of the weights, compared when they are loaded; None in manifests of earlier versions."""


@dataclass(frozen=True)
class EarlierRun:
    """The result, or the latest complete checkpoint of an unfinished run, and its manifest."""

    folder: Path
    manifest: StageManifest


# ---- finding ------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> StageManifest | None:
    """The manifest of a folder, or None if it has none.

    Raises:
        ConfigError: `stage.json` is not a manifest of this program.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        return StageManifest(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ConfigError(f"{path} is not a stage manifest: {error}") from error


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint of the highest step in a run's folder, or None."""
    steps = [step for step, folder in _checkpoints(output_dir).items() if (folder / MANIFEST_NAME).is_file()]
    return output_dir / f"{CHECKPOINT_PREFIX}{max(steps)}" if steps else None


def find_earlier_run(config: TrainConfig, parent: dict[str, Any]) -> EarlierRun | None:
    """The finished result or the latest complete checkpoint in the output folder, if any.

    Args:
        parent: Start of the run that `config` configures, from `describe_start`.

    Raises:
        ConfigError: the earlier run has another configuration or another start.
    """
    if config.output.overwrite:
        return None
    output_dir = Path(config.output.dir)
    folder = output_dir if (output_dir / MANIFEST_NAME).is_file() else latest_checkpoint(output_dir)
    manifest = None if folder is None else read_manifest(folder)
    if folder is None or manifest is None:
        return None
    # A run of an earlier version lacks newer fields, which have their defaults in it.
    before, now = build(TrainConfig, manifest.config).to_dict(), config.to_dict()
    now["data"]["template"] = config.data.template or before["data"]["template"]
    changes = changed_keys(before, now)
    if manifest.parent != parent:
        changes.append(f"start: {manifest.parent} -> {parent}")
    if changes:
        raise ConfigError(
            f"{output_dir} holds a run with other settings ({'; '.join(changes)}). Choose another output.dir, restore "
            "the settings to continue it, or pass --output.overwrite to discard it"
        )
    return EarlierRun(folder, manifest)


# ---- checking -----------------------------------------------------------------------------------------------------


def describe_start(config: TrainConfig) -> dict[str, Any]:
    """The `parent` entry of the stage's manifest: its start, checked by `check_start`, or the two backbones."""
    parent_stage = STAGES[config.stage].parent
    if config.model.start is None:
        return {"vision": config.model.vision, "language": config.model.language}
    assert parent_stage is not None, "checked by TrainConfig"
    return check_start(config.model.start, config.stage, parent_stage, config.model.force_start)


def check_start(start: str, stage: int, parent_stage: int, force: bool) -> dict[str, Any]:
    """The `parent` entry of a new manifest.

    Raises:
        ConfigError: The start is not a finished run of the parent stage, and `force` is False.
    """
    manifest = read_manifest(Path(start))
    # `created` distinguishes a retrained parent from the one that an earlier run started from.
    parent: dict[str, Any] = {"path": start, "stage": None, "created": None}
    if manifest is not None:
        parent |= {"stage": manifest.stage, "created": manifest.created}
    if force or (manifest is not None and manifest.stage == parent_stage and manifest.finished):
        return parent
    if not Path(start).exists():
        problem = "is no folder here"
    elif manifest is None:
        problem = "has no stage.json, so it is no checkpoint of this program's training (or is not finished)"
    elif manifest.stage != parent_stage:
        problem = f"holds stage {manifest.stage}"
    else:
        problem = f"is a checkpoint at step {manifest.step} of an unfinished run"
    raise ConfigError(
        f"stage {stage} starts from a finished stage {parent_stage}, but model.start {start} {problem}. Train stage "
        f"{parent_stage} first, name its folder in model.start, or pass --force-start to start from it all the same"
    )


def check_same_data(manifest: StageManifest, fingerprint: str) -> None:
    """Refuses to continue a run, or to call it complete, if its data have changed."""
    if manifest.data_fingerprint != fingerprint:
        raise ConfigError(
            "the files of data.sources have changed since this run started; pass --output.overwrite to train on the "
            "new ones, or choose another output.dir"
        )


def changed_keys(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences of two resolved configurations, as `a.b: 1 -> 2`, without `FREE_KEYS`."""
    before, after = _flatten(earlier), _flatten(now)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _is_free(key)
    ]


def _is_free(key: str) -> bool:
    """Returns True for a key of FREE_KEYS, in whichever item of a list."""
    return f"{re.sub(r'[.][0-9]+', '', key)}.".startswith(tuple(f"{free}." for free in FREE_KEYS))


def _flatten(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# ---- writing ------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: StageManifest) -> None:
    """Writes `stage.json` atomically."""
    write_json(folder / MANIFEST_NAME, dataclasses.asdict(manifest))


def checkpoint_bytes(model: nn.Module, has_master_weights: bool) -> int:
    """Approximate size of a checkpoint: weights, and the optimizer state of trained parameters.

    Args:
        has_master_weights: The optimizer keeps a float32 copy of trained parameters, as DeepSpeed's does.
    """
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # of a 4-bit weight, which is saved as the start has it
        per_element = (parameter if state is None else state).dtype.itemsize
        if parameter.requires_grad:
            per_element += MOMENT_BYTES + MASTER_WEIGHT_BYTES * has_master_weights
        total += per_element * num_weights(parameter)
    return total


@contextmanager
def writing(folder: Path, output_dir: Path, needed: int) -> Iterator[None]:
    """Turns failures to write about `needed` bytes into `folder` of a run into a `SaveError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError of its archive writer; other RuntimeErrors pass.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        whole = latest_checkpoint(output_dir)
        kept = "there is no earlier checkpoint" if whole is None else f"{whole} is whole, and the run continues from it"
        reason = " ".join(str(error).split())
        raise SaveError(
            f"cannot write {folder} ({type(error).__name__}: {reason}): it takes about {needed} bytes, and "
            f"{shutil.disk_usage(output_dir).free} are free. Make room, or save less often or fewer "
            f"(output.save_every, output.keep), and run the same command again: {kept}"
        ) from error


def remove_checkpoints(output_dir: Path, keep: int) -> None:
    """Removes all checkpoints, also incomplete ones, except the `keep` latest complete ones."""
    folders = _checkpoints(output_dir)
    complete = sorted(step for step, folder in folders.items() if (folder / MANIFEST_NAME).is_file())
    for step in folders.keys() - set(complete[max(len(complete) - keep, 0) :]):
        shutil.rmtree(folders[step])


def _checkpoints(output_dir: Path) -> dict[int, Path]:
    """Checkpoint folders of a run by step, complete or not."""
    folders = {}
    for folder in output_dir.glob(f"{CHECKPOINT_PREFIX}*"):
        number = folder.name.removeprefix(CHECKPOINT_PREFIX)
        if number.isdigit():
            folders[int(number)] = folder
    return folders


# ---- converting ---------------------------------------------------------------------------------------------------


def make_universal(checkpoint: Path) -> None:
    """Converts a ZeRO checkpoint to DeepSpeed's universal format, which any number of processes can load.

    Each process of ZeRO saves its shard of the optimizer state, which only the same number of processes can read; the
    universal format stores the state of each parameter whole. The order of samples does not change, since the global
    batch size does not; dropout masks do.

    Rank 0 converts, before the process group is initialized, so that no collective times out while large files are
    written. The other ranks wait for a marker file in the folder, which all nodes must see in order to load it anyway.
    A converted checkpoint is not converted again.

    Raises:
        ConfigError: The conversion failed; the message holds DeepSpeed's last line.
    """
    done = checkpoint / _UNIVERSAL_DONE
    if rank() != 0:
        while not done.is_file():  # if rank 0 fails, the launcher ends this process
            time.sleep(_POLL_SECONDS)
        return
    if done.is_file():
        return
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    universal = checkpoint / f"{tag}_universal"
    shutil.rmtree(universal, ignore_errors=True)  # left by a conversion that was killed
    logger.info("converting %s for another number of processes", checkpoint / tag)
    folders = ["--input_folder", str(checkpoint / tag), "--output_folder", str(universal)]
    converted = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--inject_missing_state"],
        capture_output=True,
        text=True,
        check=False,
    )
    if converted.returncode != 0:
        last = (converted.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(
            f"{checkpoint} could not be converted for another number of processes ({last}). Run it with as many "
            "processes as wrote it, or pass --output.overwrite to train from the beginning"
        )
    (checkpoint / "latest_universal").write_text(universal.name, encoding="utf-8")
    done.touch()
