"""A checkpoint whose weights are not read yet: configuration, files, and renaming of keys."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from avg_llava.checkpoints.weight_files import StoredTensor, read_tensors, resolve_folder, stored_tensors
from avg_llava.model.configuration import AvgLlavaConfig

TensorT = TypeVar("TensorT")

Renaming = list[tuple[str, str | None]]
"""(pattern, replacement) of keys to this package's names; the first match wins, None drops the key."""

ROUTER_KEYS = "model.router."


@dataclass(frozen=True)
class WeightSource:
    """Weights in a folder (perhaps below `relative_to`) or hub repository, and the renaming of their keys."""

    path: str | Path
    renaming: Renaming
    relative_to: Path | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose weights are not read yet.

    Attributes:
        name: Path or hub id, for messages.
        native_folder: Folder that transformers' `from_pretrained` can read; None if keys have to be renamed first.
        fresh: Key prefixes of parts that may be missing and are then initialised.
    """

    name: str
    config: AvgLlavaConfig
    sources: tuple[WeightSource, ...]
    native_folder: Path | None = None
    fresh: tuple[str, ...] = ()

    def tensors(self, read: Callable[[Path], Mapping[str, Tensor]] = read_tensors) -> dict[str, Tensor]:
        """All weights under this package's names; `read` gives the tensors of a folder."""
        return self._merge(read)

    def stored(self) -> dict[str, StoredTensor]:
        """All weights under this package's names, not read yet."""
        return self._merge(stored_tensors)

    def _merge(self, read: Callable[[Path], Mapping[str, TensorT]]) -> dict[str, TensorT]:
        merged: dict[str, TensorT] = {}
        for source in self.sources:
            merged |= rename_keys(read(resolve_folder(source.path, source.relative_to)), source.renaming)
        return merged


def rename_keys(tensors: Mapping[str, TensorT], renaming: Renaming) -> dict[str, TensorT]:
    """Renames keys by the first pattern that matches; keys that match none stay as they are."""
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, replacement in renaming:
            if re.search(pattern, key):
                if replacement is not None:
                    renamed[re.sub(pattern, replacement, key, count=1)] = tensor
                break
        else:
            renamed[key] = tensor
    return renamed
