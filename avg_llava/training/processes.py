"""The processes of a run: who they are, what they need before DeepSpeed starts, and how they leave."""

import json
import logging
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed
from transformers.utils.logging import disable_progress_bar

from avg_llava.common.settings import ConfigError
from avg_llava.training.config import TrainConfig


def rank() -> int:
    """Number of this process, 0 where there is only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes, over all nodes, as the launcher announces it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def uses_cpu(config: TrainConfig) -> bool:
    """Whether the run computes on the CPU."""
    return config.runtime.device == "cpu" or not torch.cuda.is_available()


def set_up_logging() -> None:
    """Rank 0 says what happens, the others only what goes wrong."""
    level = logging.INFO if rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for noisy in ("DeepSpeed", "deepspeed", "httpx", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("avg_llava").setLevel(level)
    # accelerate warns that DeepSpeed, and not it, accumulates gradients: so transformers' Trainer wants it.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that newer releases of torch deprecate, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # transformers shows a bar for every file it writes; the bar of the training itself is another one.
    disable_progress_bar()


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Parse a DeepSpeed JSON file and refuse one whose result could not be saved.

    Raises:
        ConfigError: no such file, no JSON, or ZeRO-3 that does not gather its weights when it saves.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"runtime.deepspeed: cannot read {path} ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"runtime.deepspeed: {path} is not valid JSON: {error}") from error
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ConfigError(
            f"runtime.deepspeed: {path} needs zero_optimization.stage3_gather_16bit_weights_on_model_save true, or the "
            "stage's result would hold no weights"
        )
    return settings


def prepare_deepspeed(use_cpu: bool) -> None:
    """What DeepSpeed needs before its first process group.

    On a CPU it would compile a shared-memory communication kernel, which takes minutes and a compiler; gloo does
    without. A single process started without a launcher gets the variables that a launcher would set.
    """
    import deepspeed.ops

    if use_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))


def leave(code: int) -> NoReturn:
    """End the process at once, after everything is saved.

    Not through the interpreter's own shutdown: gloo frees its work there, and about one ZeRO-3 process in ten aborts
    while it does, which would turn a finished run into a failed one.
    """
    if code == 0 and distributed.is_initialized():
        distributed.barrier()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
