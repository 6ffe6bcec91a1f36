"""Folders of saved models: the modelling files beside the weights, and nothing left of an earlier model.

transformers loads a saved model without this package through `auto_map` in its JSON files, which names classes in the
Python files of the same folder (with `trust_remote_code=True` only). These are :mod:`avg_llava.model.auto` and the
modules that it imports, with relative imports and flat names; of unchanged source they are the same, byte for byte.
This package never runs code from a model's folder.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

from avg_llava.common.files import write_bytes

PREFIX = "avg_llava_"
"""Beginning of the names of modelling files."""
HEADER = """\
# SPDX-License-Identifier: Apache-2.0
# Saved with a model of AVG-LLaVA, and run by transformers with trust_remote_code=True only.
"""
AUTO_MAP = {
    "AutoConfig": f"{PREFIX}auto.AvgLlavaConfig",
    "AutoModel": f"{PREFIX}auto.AvgLlavaForConditionalGeneration",
    "AutoModelForImageTextToText": f"{PREFIX}auto.AvgLlavaForConditionalGeneration",
    "AutoProcessor": f"{PREFIX}auto.AvgLlavaProcessor",
    "AutoImageProcessor": f"{PREFIX}auto.AvgLlavaImageProcessor",
}
"""All in one module: transformers makes one set of modules for each file that `auto_map` names."""

CONFIG_NAME = "config.json"
NEW_FOLDER = ".new"
"""Folder inside a model's folder for files that are not complete yet."""
# Files in which transformers, peft, the original code and this program look for a model or a part of it.
_MODEL_FILES = (
    CONFIG_NAME, "generation_config.json", "model*.safetensors", "model*.safetensors.index.json", "weights.safetensors",
    "pytorch_model*.bin", "pytorch_model*.bin.index.json", "consolidated*.pth", "consolidated*.safetensors",
    "adapter_model.*", "adapter_config.json", "non_lora_trainables.bin", "mm_projector.bin", f"{PREFIX}*.py",
    "stage.json",  # the manifest of the training that wrote the earlier model, with checksums of its weights
)  # fmt: skip
_IMPORT = re.compile(r"^(\s*from )avg_llava\.(\w+)\.(\w+)(?= import )", re.MULTILINE)


def modelling_files() -> dict[str, str]:
    """Names and contents of the modelling files."""
    here = Path(__file__)
    if here.name.startswith(PREFIX):  # this module is one of them
        return {file.name: file.read_text(encoding="utf-8") for file in sorted(here.parent.glob(f"{PREFIX}*.py"))}
    files: dict[str, str] = {}
    modules = ["model/auto"]
    for module in modules:  # grows
        text = (here.parents[1] / f"{module}.py").read_text(encoding="utf-8")
        modules += sorted({f"{room}/{name}" for _, room, name in _IMPORT.findall(text)} - set(modules))
        name = f"{PREFIX}{module.partition('/')[2]}.py"
        assert name not in files, f"two modules would be saved as {name}"
        files[name] = HEADER + _IMPORT.sub(rf"\1.{PREFIX}\3", text)
    return files


def write_modelling_files(folder: str | os.PathLike[str]) -> None:
    """Writes the modelling files into a folder, which is created, and removes those of another version."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = modelling_files()
    for name, text in files.items():
        write_bytes(folder / name, text.encode("utf-8"))
    for file in folder.glob(f"{PREFIX}*.py"):
        if file.name not in files:
            file.unlink()


@contextlib.contextmanager
def replaced_model(folder: str | os.PathLike[str], others: Iterable[str] = ()) -> Iterator[Path]:
    """Yields an empty folder for a model's files, which on success replace the model in `folder`.

    Nothing of the earlier model stays: no shard, index, pickled weights or adapter. Its files may be mapped into memory
    while the new ones are written. `config.json` is removed first and written last, so that a folder that has one holds
    one whole model, however the process ended. `others` are patterns of further files that must not stay.

    Raises:
        ValueError: A folder has the name of a file of a model; the earlier model stays.
    """
    folder = Path(folder)
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise ValueError(f"{folder} exists and is not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / NEW_FOLDER
    if new.is_symlink() or new.is_file():
        raise ValueError(f"{new} is not a folder: remove it, as the new files are gathered there")
    patterns = (*_MODEL_FILES, *others)
    _stale_files(folder, patterns)  # refuses folders before anything is written
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir()
    try:
        yield new
        files = [file.relative_to(new) for file in new.rglob("*") if file.is_file()]
        for parent in {file.parent for file in files} - {Path()}:
            if (folder / parent).is_symlink() or (folder / parent).is_file():
                raise ValueError(f"{folder / parent} is not a folder of its own: remove it")
        for stale in _stale_files(folder, (*patterns, *map(str, files))):
            stale.unlink(missing_ok=True)  # may match two patterns
        for file in sorted(files, key=lambda file: (file == Path(CONFIG_NAME), file)):
            (folder / file.parent).mkdir(exist_ok=True)
            os.replace(new / file, folder / file)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _stale_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in a folder that match patterns, in their order. Raises ValueError if one of them is a folder."""
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            raise ValueError(f"{path} is a folder, but its name is that of a model's file: move it, or save elsewhere")
    return found


def remove_chat_templates(folder: str | os.PathLike[str]) -> None:
    """Removes the chat templates of an earlier processor, some of which transformers prefers to a newer file."""
    for name in (CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE):
        (Path(folder) / name).unlink(missing_ok=True)
    shutil.rmtree(Path(folder) / CHAT_TEMPLATE_DIR, ignore_errors=True)
