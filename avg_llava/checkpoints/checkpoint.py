"""A checkpoint whose weights are not read yet: configuration, files, and renaming of keys."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from avg_llava.checkpoints.adapters import Adapter
from avg_llava.checkpoints.tokenizers import has_tokenizer
from avg_llava.checkpoints.weight_files import (
    CheckpointError,
    StoredTensor,
    resolve_folder,
    stored_tensors,
    weight_files,
)
from avg_llava.model.configuration import AvgLlavaConfig

TensorT = TypeVar("TensorT")

Renaming = list[tuple[str, str | None]]
"""(pattern, replacement) of keys to this package's names; the first match wins, None drops the key."""

ROUTER_KEYS = "model.router."
NEWLINE_KEY = "model.image_newline"


@dataclass(frozen=True)
class WeightSource:
    """Weights in a file, a folder (perhaps below `relative_to`) or a hub repository, and the renaming of their keys.

    Attributes:
        base: Prefix of the keys of a causal language model's layers; without a key that has it, the folder holds the
            layers alone.
    """

    path: str | Path
    renaming: Renaming
    relative_to: Path | None = None
    base: str = ""

    def resolve(self) -> Path:
        """The folder, or the file, that holds the weights; what is on the hub is downloaded."""
        path = Path(self.path)
        return path if path.is_file() else resolve_folder(path, self.relative_to)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose weights are not read yet.

    Attributes:
        name: Path or hub id, for messages.
        fresh: Key prefixes of parts that may be missing and are then initialised.
        folder: Folder of its `config.json`, and of its `generation_config.json` if it has one.
        tokenizer: Folder of its tokenizer.
        image_settings: Folder of its image settings; None: CLIP's.
        adapter: Low-rank adapters of its weights, which are merged when they are read.
        notes: Sentences about what was assumed, and what differs from the code that wrote the checkpoint.
    """

    name: str
    config: AvgLlavaConfig
    sources: tuple[WeightSource, ...]
    fresh: tuple[str, ...] = ()
    folder: Path | None = None
    tokenizer: Path | None = None
    image_settings: Path | None = None
    adapter: Adapter | None = None
    notes: tuple[str, ...] = ()

    def tensors(self, read: Callable[[Path], Mapping[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """All weights under this package's names; `read` gives those of a file or folder, without adapters."""
        if read is not None:
            return self._merge(read)
        return {name: tensor.read() for name, tensor in self.stored().items()}

    def stored(self) -> dict[str, StoredTensor]:
        """All weights under this package's names, not read yet."""
        stored = self._merge(stored_tensors)
        if self.adapter is None:
            return stored
        renaming = self.sources[0].renaming  # of the base model
        return self.adapter.merged(stored, lambda name: next(iter(rename_keys({name: None}, renaming))))

    def files(self) -> set[Path]:
        """The files that the model is made of: configuration and weights, of its parts elsewhere too."""
        files = {file for source in self.sources for file in weight_files(source.resolve())}
        if self.folder is not None and (self.folder / "config.json").is_file():
            files.add(self.folder / "config.json")
        return files | (set() if self.adapter is None else self.adapter.files())

    def _merge(self, read: Callable[[Path], Mapping[str, TensorT]]) -> dict[str, TensorT]:
        merged: dict[str, TensorT] = {}
        for source in self.sources:
            found = read(source.resolve())
            if not any(key.startswith(source.base) for key in found):
                raise CheckpointError(
                    f"{source.path}: no weight's name begins with {source.base!r}; these are not the weights of a "
                    "causal language model with its head"
                )
            merged |= rename_keys(found, source.renaming)
        return merged


def tokenizer_folder(*folders: Path) -> Path:
    """The first of some folders with files of a tokenizer; the first one if none has any."""
    return next((each for each in folders if has_tokenizer(each)), folders[0])


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


def invert(renaming: Renaming) -> Renaming:
    """The renaming back to the first name that gives a name; dropped and unchanged keys have none.

    Raises:
        ValueError: A pattern is not `^` and a literal prefix.
    """
    inverse: dict[str, str] = {}
    for pattern, replacement in renaming:
        prefix = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^"))
        if replacement in (None, prefix, r"\1"):
            continue
        if pattern != f"^{re.escape(prefix)}":
            raise ValueError(f"{pattern!r} is not a prefix")
        inverse.setdefault(f"^{re.escape(replacement)}", prefix)
    return list(inverse.items())
