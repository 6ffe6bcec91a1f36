"""Tokenizers in checkpoint folders: whether a folder has one, and one clear error for a damaged one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

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
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more special
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the tokenizer or the processor in {folder} cannot be read: {reason}") from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_rows: int, folder: Path) -> None:
    """Checks that a model embeds what its tokenizer gives; added tokens may be beyond, as Gemma's for images is.

    Args:
        tokenizer: The tokenizer.
        num_rows: Rows of the model's embeddings.
        folder: Folder of the tokenizer, for messages.

    Raises:
        CheckpointError: The tokenizer's own vocabulary, or one of its BOS, EOS, padding and unknown tokens, is beyond.
    """
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    largest = max(tokenizer.vocab_size - 1, *(number for number in special if number is not None))
    if largest >= num_rows:
        raise CheckpointError(
            f"the tokenizer in {folder} gives ids up to {largest}, but the model embeds {num_rows} tokens "
            "(text_config.vocab_size): they do not belong together"
        )
