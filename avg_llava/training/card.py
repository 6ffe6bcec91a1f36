"""Model cards: the README.md of a stage's result, filled from the manifests of its run and of the runs before it."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from avg_llava.checkpoints.weight_files import stored_tensors
from avg_llava.common.files import hash_bytes, write_bytes
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.router import find_router
from avg_llava.training.checkpoint import StageManifest, read_manifest
from avg_llava.training.stages import STAGES

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
UNKNOWN_REPOSITORY = "owner/name"
"""Stands for the model in a card whose repository is not known yet."""

_MARK = "<!-- Written by avg-llava, and written anew as long as nobody edits it: {} -->\n"
_MARKED = re.compile(rb"(?s)(.*)" + re.escape(_MARK.encode()).replace(rb"\{\}", rb"(\w{16})"))


@dataclass(frozen=True)
class Score:
    """A benchmark's headline score.

    Attributes:
        levels: Visual tokens per crop -> share of the images; empty if a level was forced or there was no image.
        granularity: Choice of the level: "auto" for the router, or visual tokens per crop.
        token_share: Visual tokens relative to the finest level.
    """

    benchmark: str
    metric: str
    value: float
    granularity: str
    token_share: float
    num_questions: int
    levels: dict[str, float] = field(default_factory=dict)


def lineage(manifest: StageManifest) -> list[StageManifest]:
    """The manifests of a run and of the runs that it started from, the first stage first.

    It begins with the latest one whose start has no manifest, or has another one than when the run started.
    """
    runs = [manifest]
    while "path" in runs[0].parent:
        earlier = read_manifest(Path(runs[0].parent["path"]))
        if earlier is None or earlier.created != runs[0].parent["created"]:
            break
        runs.insert(0, earlier)
    return runs


def base_models(runs: Sequence[StageManifest]) -> list[str]:
    """Hub ids of the models that the first run started from; those in local folders are left out."""
    names = [str(value) for key, value in runs[0].parent.items() if key in ("vision", "language", "path")]
    return [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) and not Path(name).exists()]


def render_card(
    folder: Path,
    manifest: StageManifest | None,
    scores: Sequence[Score] = (),
    repository: str = UNKNOWN_REPOSITORY,
    license_name: str = "other",
) -> str:
    """The card of a model, which ends in a mark by which an edited one is known.

    Args:
        folder: Folder with the model's configuration and weights.
        manifest: That of the run which trained it, None if it is not known.
        scores: Rows of the table of scores.
        repository: Hub id under which the model is loaded.
        license_name: The hub's identifier of the weights' licence.
    """
    config = AvgLlavaConfig.from_pretrained(folder, local_files_only=True)
    tensors = stored_tensors(folder)
    runs = [] if manifest is None else lineage(manifest)
    front: dict[str, Any] = {
        "license": license_name,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["avg-llava", "llava-next"],
    }
    if runs and (bases := base_models(runs)):
        front["base_model"] = [name.partition("@")[0] for name in bases]
    environment = Environment(
        loader=PackageLoader("avg_llava.training"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("card.md.j2").render(
        front=yaml.safe_dump(front, sort_keys=False),
        title=Path(repository).name if repository != UNKNOWN_REPOSITORY else "AVG-LLaVA",
        repository=repository,
        license=license_name,
        config=config,
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        dtype=str(config.dtype).removeprefix("torch."),
        is_routed=manifest is None or "router" in STAGES[manifest.stage].trains,
        foreign=[name for name in map(_module, (find_router(config), config.ladder, config.tower)) if name],
        runs=runs,
        stages=STAGES,
        start_name=_start_name,
        scores=scores,
    )
    return text + _MARK.format(_digest(text.encode()))


def _module(entry: Any) -> str | None:
    """The module of a router, a ladder or a tower that is defined outside this package, None if it is inside."""
    name = (entry if isinstance(entry, type) else type(entry)).__module__
    return None if name.startswith("avg_llava") else name


def write_card(folder: Path, *arguments: Any, **options: Any) -> bool:
    """Writes the card of a model unless its folder holds one that was edited; arguments as for :func:`render_card`.

    Returns:
        False if an edited card was kept.
    """
    if is_edited(folder):
        logger.info("%s was edited and is kept", folder / CARD_NAME)
        return False
    write_bytes(folder / CARD_NAME, render_card(folder, *arguments, **options).encode())
    return True


def is_edited(folder: Path) -> bool:
    """Returns True if a folder has a README.md that is not exactly what :func:`write_card` wrote."""
    file = folder / CARD_NAME
    if not file.is_file():
        return False
    found = _MARKED.fullmatch(file.read_bytes())
    return found is None or _digest(found[1]).encode() != found[2]


def _digest(text: bytes) -> str:
    return hash_bytes(text)[:16]


def _start_name(run: StageManifest) -> str:
    """Start of a run for readers: hub ids, else the folder's name without its place on this machine."""
    if "path" in run.parent:
        stage = run.parent["stage"]
        return f"stage {stage}" if stage is not None else _public_name(run.parent["path"])
    return " and ".join(_public_name(run.parent[part]) for part in ("vision", "language"))


def _public_name(path: str) -> str:
    return f"`{path if not Path(path).exists() and not Path(path).is_absolute() else Path(path).name}`"
