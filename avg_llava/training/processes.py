"""Processes of a run: ranks, logging, preparation for DeepSpeed, and exit."""

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
    """Rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes over all nodes, as set by the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def uses_cpu(config: TrainConfig) -> bool:
    """True if the run computes on the CPU."""
    return config.runtime.device == "cpu" or not torch.cuda.is_available()


def device_of(config: TrainConfig) -> torch.device:
    """The device that this process computes on."""
    return torch.device("cpu") if uses_cpu(config) else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def set_up_logging() -> None:
    """Logs from level INFO on rank 0, and from WARNING on other ranks; silences libraries."""
    level = logging.INFO if rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for noisy in ("DeepSpeed", "deepspeed", "httpx", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("avg_llava").setLevel(level)
    # accelerate warns that DeepSpeed accumulates gradients in its stead, which transformers' Trainer intends.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # At every step, DeepSpeed calls collectives by names that newer releases of torch deprecate.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Disables transformers' bar for every file it writes, not that of the training.
    disable_progress_bar()


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Parses a DeepSpeed JSON file, and refuses settings under which the result could not be saved.

    Raises:
        ConfigError: the file is missing or not JSON, or ZeRO-3 does not gather weights when saving.
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
    """Prepares the environment for DeepSpeed's first process group.

    On a CPU, disables the shared-memory communication kernel, whose compilation takes minutes; gloo needs none. For a
    single process without a launcher, sets the variables that a launcher would set.
    """
    import deepspeed.ops

    if use_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        with socket.create_server(("127.0.0.1", 0)) as probe:  # a free port
            os.environ.setdefault("MASTER_PORT", str(probe.getsockname()[1]))


def leave(code: int) -> NoReturn:
    """Exits the process at once, without the interpreter's shutdown.

    During shutdown gloo frees its work objects, where about one ZeRO-3 process in ten aborts, which would turn a
    finished run into a failed one.
    """
    if code == 0 and distributed.is_initialized():
        distributed.barrier()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
