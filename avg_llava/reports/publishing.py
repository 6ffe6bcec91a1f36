"""Uploads of models to the hub: the files that make up a model and its card, and nothing else of their folder."""

import fnmatch
import json
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

from avg_llava.checkpoints.weight_files import INDEX_NAME, CheckpointError, read_config, weight_files
from avg_llava.evaluation.evaluate import fingerprint_model
from avg_llava.evaluation.results import FORMAT, Result, ResultError, parse_result, read_json
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.saving import AUTO_MAP, PREFIX, modelling_files
from avg_llava.planning.inspection import inspect
from avg_llava.training.card import CARD_NAME, Score, is_edited, render_card
from avg_llava.training.checkpoint import CHECKPOINT_PREFIX, MANIFEST_NAME, StageManifest, read_manifest
from avg_llava.training.lora import ADAPTER_FOLDER
from avg_llava.training.monitor import LOG_NAME
from avg_llava.training.trainer import CONFIG_NAME, TENSORBOARD_FOLDER, TRACKIO_FOLDER

logger = logging.getLogger(__name__)

# Files of a model that transformers loads, besides weights and modelling files. People edit the first ones.
_SETTINGS_FILES = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
_OTHER_FILES = (
    "chat_template.jinja", "additional_chat_templates/*.jinja", "tokenizer.json", "tokenizer.model",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
# Files of an earlier model, which an upload removes from the repository.
_REPLACED = (*_SETTINGS_FILES, *_OTHER_FILES, "model*.safetensors", INDEX_NAME, f"{PREFIX}*.py")
_LEGAL_FILES = tuple(name + ending for name in ("LICENSE", "NOTICE") for ending in ("", ".md", ".txt"))
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
# An absolute path of at least two parts anywhere in a text; addresses, relative paths and marks such as </s> are none.
_PATH = re.compile(
    r"(?:file:/+|(?<!\w)[A-Za-z]:\\+|(?<![\w./:<])(?:~\w*)?/|(?<=\w:)/(?!/))[\w.@-][\w.@ -]*[/\\][^\s\"']*"
)
_SECRET = re.compile(
    r"\b(?:hf_|gh[oprsu]_|github_pat_|sk-|AKIA|xox[abp]-)[\w-]{8,}"
    r"|(?i:secret|password|api_?key)[\"']?\s*[:=]\s*[\"']?[\w+/-]{8,}"
    r"|(?i:token)[\"']?\s*[:=]\s*[\"']?(?=[\w+/-]*\d)[\w+/-]{16,}"  # pad_token and the like are words
)


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
        ValueError: The folder holds no whole model of this version, a file of it is a link or holds what is private, or
            a result is another model's.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{repository!r} is no repository: it is named owner/name")
    manifest = _check_model(folder)
    weights = {file.name for file in weight_files(folder)}
    wanted = {*weights, *modelling_files(), *([] if "model.safetensors" in weights else [INDEX_NAME])}
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    uploaded, skipped = [], {}
    for name in names:
        file, top = folder / name, name.partition("/")[0]
        is_link = file.resolve() != folder.resolve() / name
        private = None if is_link or name not in (*_SETTINGS_FILES, *_RUN_FILES) else _private(file)
        if name in wanted or _matches(name, (*_SETTINGS_FILES, *_OTHER_FILES)):
            if is_link or private:
                problem = (
                    "is a link: put a copy of the file there" if is_link else f"{private}: remove it from the file"
                )
                raise ValueError(f"{file} {problem}")
            uploaded.append(file)
        elif name in (*_LEGAL_FILES, *_RUN_FILES):
            if is_link or private:
                skipped[name] = "a link" if is_link else str(private)
            else:
                uploaded.append(file)
        elif name != CARD_NAME:
            reasons = (reason for pattern, reason in _REASONS.items() if fnmatch.fnmatch(top, pattern))
            skipped[f"{top}/" if "/" in name else name] = next(reasons, _OTHER)
    if is_edited(folder):
        if (folder / CARD_NAME).is_symlink() or _SECRET.search((folder / CARD_NAME).read_text(encoding="utf-8")):
            raise ValueError(f"{folder / CARD_NAME} is a link, or holds what looks like an access token or a password")
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
        return Upload(folder, repository, tuple(uploaded), skipped, card, is_edited=True)
    card = render_card(folder, manifest, read_scores(folder, results), repository, license_name)
    return Upload(folder, repository, tuple(uploaded), skipped, card, is_edited=False)


def upload(plan: Upload, private: bool = False) -> str:
    """Creates the repository if there is none, and commits the files; those of an earlier model are deleted from it.

    Returns:
        The commit's address.

    Raises:
        ValueError: The hub cannot be reached, or refuses.
    """
    api = HfApi()
    try:
        api.create_repo(plan.repository, private=private or None, exist_ok=True)
        stale = [name for name in api.list_repo_files(plan.repository) if _matches(name, (*_REPLACED, *_RUN_FILES))]
        files = {file.relative_to(plan.folder).as_posix(): file for file in plan.files}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, file) for name, file in files.items()),
            CommitOperationAdd(CARD_NAME, plan.card.encode()),
            *(CommitOperationDelete(name) for name in stale if name not in files),
        ]
        return api.create_commit(plan.repository, operations, commit_message="Upload model").commit_url
    except HfHubHTTPError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{constants.ENDPOINT} refuses {plan.repository}: {reason}; nothing was committed") from error
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
    if config.get("model_type") != AvgLlavaConfig.model_type:
        raise ValueError(
            f"{folder} has the layout of {config.get('model_type')!r} models; push takes this package's: write it with "
            f"`avg-llava convert {folder} OUTPUT --to avg` (`hf upload` uploads any folder as it is)"
        )
    if not (folder / PROCESSOR_NAME).is_file():
        raise ValueError(
            f"{folder} has no {PROCESSOR_NAME}, without which nobody can ask the model: save its processor"
        )
    missing = [name for name in modelling_files() if not (folder / name).is_file()]
    if config.get("auto_map") != AUTO_MAP or missing:
        raise ValueError(
            f"{folder} cannot be loaded without this package ({', '.join(missing) or 'config.json has no auto_map'}): "
            "rewrite it with `avg-llava convert --to avg`"
        )
    if not all(fnmatch.fnmatch(file.name, "model*.safetensors") for file in weight_files(folder)):
        raise ValueError(f"{folder} has weights that are no model.safetensors: rewrite it with `avg-llava convert`")
    manifest = read_manifest(folder)
    if manifest is not None and not manifest.finished:
        raise ValueError(f"{folder} is a checkpoint of an unfinished run; upload the run's result")
    if problems := inspect(folder, scan=True).problems:
        raise CheckpointError(f"{folder} cannot be uploaded ({len(problems)} problems): {'; '.join(problems)}")
    return manifest


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Returns True if a name has as many folders as one of the patterns, and matches it."""
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _private(file: Path) -> str | None:
    """Names the first thing in a JSON or YAML file that is not for others: an access token, or a path of this machine.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is damaged, so it cannot be searched for what is private: {error}") from error
    if _SECRET.search(text):
        return "holds what looks like an access token or a password"
    values = list(_texts(content))
    found = [
        match[0] for each in [*values, *([] if file.suffix == ".json" else [text])] for match in _PATH.finditer(each)
    ]
    if file.name in _RUN_FILES:  # other files hold single tokens that begin like a path
        found = [each for each in values if each.startswith("~") or Path(each).is_absolute()] + found
    return f"names a path of this machine, {found[0]}" if found else None


def _texts(content: Any) -> Iterator[str]:
    """The texts in nested lists and mappings, keys included."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for entry in [*content, *content.values()] if isinstance(content, dict) else content:
            yield from _texts(entry)
