"""What numbers were measured on."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from avg_llava.training.manifest import library_versions


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_facts() -> dict[str, Any]:
    """Processor, cores, GPU, system and the versions of libraries."""
    return {
        "processor": _processor_name(),
        "cores": num_cores(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(),
        **library_versions(),
    }


def _processor_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


__all__ = ["machine_facts", "num_cores"]
