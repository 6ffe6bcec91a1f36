"""Downloads from the Hugging Face hub: of a repository, only the files that loading its model needs."""

import glob
from collections.abc import Callable
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

# Configuration, tokenizer, processor, indices of shards, and parts of models, all small.
_SMALL_FILES = [
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "mm_projector.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "non_lora_trainables.bin",
]
_NOT_NEEDED = ["*/*", "trainer_state.json"]


@cache
def download(
    repository: str, revision: str | None, weight_names: tuple[str, ...], read_index: Callable[[Path], dict[str, str]]
) -> Path:
    """The local folder of a hub repository, with its weights in one format; files in the local cache are not fetched.

    A repository is looked up once per process, so that all parts of a model are of one revision.

    Args:
        repository: `owner/name`.
        revision: Branch, tag or commit; None is the main branch.
        weight_names: Names of indices of shards and of single files of weights; the first that there is, is taken.
        read_index: Gives the file of every tensor.

    Raises:
        ValueError: The repository, the revision or a file is not to be had.
    """
    folder = _fetch(repository, revision, revision, "the configuration", _SMALL_FILES)
    commit = folder.name
    for name in weight_names:
        _fetch(repository, revision, commit, name, [name])
        if (folder / name).is_file():
            shards = sorted(set(read_index(folder / name).values())) if name.endswith(".json") else []
            for shard in shards:
                _fetch(repository, revision, commit, shard, [glob.escape(shard)])
            break
    return folder


def _fetch(repository: str, revision: str | None, commit: str | None, subject: str, patterns: list[str]) -> Path:
    """Downloads the files that match `patterns`, called `subject` in the error, of a commit of the revision."""
    try:
        return Path(
            snapshot_download(repository, revision=commit, allow_patterns=patterns, ignore_patterns=_NOT_NEEDED)
        )
    except (OSError, ValueError, HTTPError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{subject} of the hub repository {repository}, revision {revision or 'main'}, cannot be had "
            f"({type(error).__name__}: {reason})"
        ) from error
