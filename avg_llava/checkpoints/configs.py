"""Configurations of backbones in transformers' format, whose errors are of one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from avg_llava.checkpoints.weight_files import CheckpointError, read_config

_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, StrictDataclassError)


@contextmanager
def named_errors(folder: Path) -> Iterator[None]:
    """Turns what a library raises for a configuration into one line that names its file."""
    try:
        yield
    except CheckpointError:
        raise
    except _ERRORS as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"{folder / 'config.json'}: {reason}") from error


def read_auto_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a folder; code in it is never run.

    Raises:
        CheckpointError: There is none, or it is of no known model, or a value is none that its key may have.
    """
    model_type = read_config(folder).get("model_type")
    with named_errors(folder):
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"model_type {model_type!r} is unknown to transformers {transformers.__version__}; code that a model "
                "brings along is not run"
            )
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
