"""Tokenizers in checkpoint folders: whether a folder has one, and one clear error for a damaged one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from avg_llava.checkpoints.weight_files import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""A folder with one of these holds the vocabulary of a tokenizer."""


def has_tokenizer(folder: Path) -> bool:
    """True if a folder holds the vocabulary of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


@contextmanager
def reading_tokenizer(folder: Path) -> Iterator[None]:
    """Turns what libraries raise for a tokenizer or a processor in a folder into one line that names the folder.

    Raises:
        CheckpointError: The folder holds no tokenizer, for which transformers would make one of a few special tokens,
            or one that cannot be read.
    """
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} holds no tokenizer, neither {', '.join(TOKENIZER_FILES[:-1])} nor {TOKENIZER_FILES[-1]}"
        )
    try:
        yield
    except Exception as error:  # the tokenizers library raises nothing more special
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the tokenizer or the processor in {folder} cannot be read: {reason}") from error
