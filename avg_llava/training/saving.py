"""Checkpoints that cannot be written: one line that names the folder, and what it takes and what is free there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from avg_llava.training.checkpoint import latest_checkpoint

MASTER_WEIGHT_BYTES, MOMENT_BYTES = 4, 8  # of a trained parameter: DeepSpeed's float32 copy, Adam's two moments


class SaveError(ValueError):
    """A checkpoint or a result could not be written."""


def checkpoint_bytes(model: nn.Module, has_master_weights: bool) -> int:
    """About how many bytes a checkpoint to continue from takes: weights, and the optimizer's state of the trained ones.

    Args:
        model: Its parameters may be ZeRO-3's, of which each process holds a part.
        has_master_weights: Whether the optimizer keeps a float32 copy of what it trains, as DeepSpeed's does.
    """
    total = 0
    for parameter in model.parameters():
        per_element = parameter.element_size()
        if parameter.requires_grad:
            per_element += MOMENT_BYTES + MASTER_WEIGHT_BYTES * has_master_weights
        total += per_element * getattr(parameter, "ds_numel", parameter.numel())
    return total


@contextmanager
def writing(folder: Path, output_dir: Path, needed: int) -> Iterator[None]:
    """Around what writes a run's files: a failure to write becomes one that says what to do.

    Args:
        folder: What is being written.
        output_dir: The run's folder, with its checkpoints.
        needed: About how many bytes it takes.

    Raises:
        SaveError: The disk is full, or the folder cannot be written to for another reason.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError of its archive writer; others are no matter of the disk.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        whole = latest_checkpoint(output_dir)
        kept = "there is no earlier checkpoint" if whole is None else f"{whole} is whole, and the run continues from it"
        reason = " ".join(str(error).split())
        raise SaveError(
            f"cannot write {folder} ({type(error).__name__}: {reason}): it takes about {needed} bytes, and "
            f"{shutil.disk_usage(output_dir).free} are free. Make room, or save less often or fewer "
            f"(output.save_every, output.keep), and run the same command again: {kept}"
        ) from error
