"""Uploads of models to the hub: the files that make up a model and its card, and nothing else of their folder."""

import fnmatch
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers.utils import PROCESSOR_NAME

from avg_llava.checkpoints.weight_files import read_config, stored_tensors
from avg_llava.evaluation.evaluate import fingerprint_model
from avg_llava.evaluation.results import FORMAT, Result, ResultError, parse_result, read_json
from avg_llava.model.saving import AUTO_MAP, PREFIX, modelling_files
from avg_llava.training.card import CARD_NAME, Score, is_edited, render_card
from avg_llava.training.checkpoint import CHECKPOINT_PREFIX, MANIFEST_NAME, StageManifest, read_manifest
from avg_llava.training.lora import ADAPTER_FOLDER
from avg_llava.training.monitor import LOG_NAME
from avg_llava.training.trainer import CONFIG_NAME, TENSORBOARD_FOLDER, TRACKIO_FOLDER

logger = logging.getLogger(__name__)

# Files of a model that transformers loads, without and with this package.
_MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", f"{PREFIX}*.py",
    "processor_config.json", "preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
_LEGAL_FILES = ("LICENSE*", "NOTICE*")
_RUN_FILES = (MANIFEST_NAME, CONFIG_NAME)
_REASONS = {
    f"{CHECKPOINT_PREFIX}*": "checkpoint of the run, with the optimizer's state",
    "global_step*": "state of the optimizer",
    "optimizer.*": "state of the optimizer",
    ADAPTER_FOLDER: "the weights contain the adapters",
    LOG_NAME: "log of the run",
    TENSORBOARD_FOLDER: "log of the run",
    TRACKIO_FOLDER: "log of the run",
    "wandb": "log of the run",
    ".*": "hidden",
}
_OTHER = "not part of the model"


@dataclass(frozen=True)
class Upload:
    """An upload that is ready to be made.

    Attributes:
        files: Files below `folder`, all but the card.
        skipped: What stays here, by its name in the folder, and the reason.
        card: Content of the card, which is the folder's own if somebody edited it.
        is_edited: The card is the folder's own.
    """

    folder: Path
    repository: str
    files: tuple[Path, ...]
    skipped: dict[str, str]
    card: str
    is_edited: bool

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file by its name in the repository."""
        sizes = {file.relative_to(self.folder).as_posix(): file.stat().st_size for file in self.files}
        return {**sizes, CARD_NAME: len(self.card.encode())}

    @property
    def front_matter(self) -> str:
        """YAML at the head of the card."""
        found = re.match(r"---\n(.*?)---\n", self.card, re.DOTALL)
        return found[1] if found else ""


def plan_upload(folder: Path, repository: str, license_name: str = "other", results: Sequence[Path] = ()) -> Upload:
    """Collects the files of a model's folder and its card; nothing is written.

    Args:
        folder: A stage's result, or any folder of a model that this package saved.
        repository: `owner/name`.
        license_name: The hub's identifier of the weights' licence, for the card.
        results: Result files of `avg-llava evaluate`, besides those in the folder.

    Raises:
        ValueError: The folder holds no whole model of this version, or a result is another model's.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{repository!r} is no repository: it is named owner/name")
    manifest = _check_model(folder)
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    uploaded, skipped = [], {}
    for name in names:
        top = name.partition("/")[0]
        if _matches(name, (*_MODEL_FILES, *_LEGAL_FILES)):
            uploaded.append(folder / name)
        elif name in _RUN_FILES:
            path = next(_absolute_paths(yaml.safe_load((folder / name).read_text(encoding="utf-8"))), None)
            if path is None:
                uploaded.append(folder / name)
            else:
                skipped[name] = f"names a path of this machine, {path}"
        elif name != CARD_NAME:
            reasons = (reason for pattern, reason in _REASONS.items() if fnmatch.fnmatch(top, pattern))
            skipped[f"{top}/" if "/" in name else name] = next(reasons, _OTHER)
    if is_edited(folder):
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
        return Upload(folder, repository, tuple(uploaded), skipped, card, is_edited=True)
    card = render_card(folder, manifest, read_scores(folder, results), repository, license_name)
    return Upload(folder, repository, tuple(uploaded), skipped, card, is_edited=False)


def upload(plan: Upload, private: bool = False) -> str:
    """Creates the repository if there is none, and commits the files; those of an earlier model are deleted from it.

    Returns:
        The commit's address.

    Raises:
        ValueError: The hub cannot be reached.
        OSError: The hub refuses; a subclass of it by huggingface_hub.
    """
    api = HfApi()
    try:
        api.create_repo(plan.repository, private=private or None, exist_ok=True)
        stale = [name for name in api.list_repo_files(plan.repository) if _matches(name, (*_MODEL_FILES, *_RUN_FILES))]
        files = {file.relative_to(plan.folder).as_posix(): file for file in plan.files}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, file) for name, file in files.items()),
            CommitOperationAdd(CARD_NAME, plan.card.encode()),
            *(CommitOperationDelete(name) for name in stale if name not in files),
        ]
        return api.create_commit(plan.repository, operations, commit_message="Upload model").commit_url
    except HfHubHTTPError:
        raise
    except HTTPError as error:
        raise ValueError(f"{constants.ENDPOINT} cannot be reached: {error}; nothing was committed") from error


def read_scores(folder: Path, results: Sequence[Path] = ()) -> list[Score]:
    """Scores of the model in a folder, from result files in it or in a folder below, and from `results`.

    A result in the folder that is of another model, such as one that was there before, is left out with a warning.

    Raises:
        ResultError: One of `results` is of another model or no result.
    """
    found = {path: _result_in(path) for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])}
    chosen: dict[Path, Result] = {path: result for path, result in found.items() if result is not None}
    chosen |= {path: parse_result(read_json(path), str(path)) for path in results}
    fingerprint = fingerprint_model(folder) if chosen else None
    scores = []
    for path, result in chosen.items():
        if result.model.fingerprint != fingerprint:
            message = f"{path} is the result of another model than the one in {folder}: evaluate this one"
            if path in results:
                raise ResultError(message)
            logger.warning("%s", message)
            continue
        is_routed = result.granularity in ("auto", "all")
        scores.append(
            Score(
                benchmark=result.benchmark,
                metric=next(iter(result.metrics)),
                value=result.headline.value,
                granularity="auto" if is_routed else str(result.granularity),
                token_share=result.efficiency.token_share,
                num_questions=result.dataset.num_questions,
                levels=result.routing.levels if is_routed else {},
            )
        )
    return scores


def _result_in(path: Path) -> Result | None:
    """The result in a JSON file, or None if it holds something else."""
    content = read_json(path)
    is_result = isinstance(content, dict) and content.get("format") == FORMAT and "metrics" in content
    return parse_result(content, str(path)) if is_result else None


def _check_model(folder: Path) -> StageManifest | None:
    """Returns the manifest. Raises ValueError unless the folder holds a whole model that transformers can load."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name the folder of a saved model")
    config = read_config(folder)
    if not (folder / PROCESSOR_NAME).is_file():
        raise ValueError(
            f"{folder} has no {PROCESSOR_NAME}, without which nobody can ask the model: save its processor"
        )
    missing = [name for name in modelling_files() if not (folder / name).is_file()]
    if config.get("auto_map") != AUTO_MAP or missing:
        raise ValueError(
            f"{folder} cannot be loaded without this package ({', '.join(missing) or 'config.json has no auto_map'}): "
            "rewrite it with `avg-llava convert`"
        )
    stored_tensors(folder)
    manifest = read_manifest(folder)
    if manifest is not None and not manifest.finished:
        raise ValueError(f"{folder} is a checkpoint of an unfinished run; upload the run's result")
    return manifest


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Returns True if a name has as many folders as one of the patterns, and matches it."""
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _absolute_paths(content: Any) -> Iterator[str]:
    """Texts in nested lists and mappings that are absolute paths."""
    if isinstance(content, str) and (content.startswith("~") or Path(content).is_absolute()):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _absolute_paths(value)
