"""Facts about the machine: processor, GPU and its peak throughput, library versions, memory use."""

import importlib.metadata
import os
import platform
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RECORDED_LIBRARIES = ("avg-llava", "torch", "transformers", "deepspeed", "accelerate")


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU: bytes of memory, and dense operations per second by precision.

    `half` is of bf16 and fp16. `device_name` is the part of the CUDA name that tells the model from slower ones.
    """

    memory: float
    half: float
    tf32: float
    float32: float
    device_name: str

    def peak(self, precision: str, tf32: bool) -> float:
        """Peak operations per second in "fp32", "bf16" or "fp16"; `tf32`: float32 matrix products use TF32."""
        if precision != "fp32":
            return self.half
        return self.tf32 if tf32 else self.float32


GPUS = {
    "a100": Gpu(80e9, 312e12, 156e12, 19.5e12, "A100"),
    "a100-40gb": Gpu(40e9, 312e12, 156e12, 19.5e12, "A100"),
    "h100": Gpu(80e9, 989e12, 494e12, 67e12, "H100 80GB HBM3"),
    "h200": Gpu(141e9, 989e12, 494e12, 67e12, "H200"),
    "l40s": Gpu(48e9, 362e12, 183e12, 91.6e12, "L40S"),
    "rtx4090": Gpu(24e9, 165e12, 82.6e12, 82.6e12, "RTX 4090"),
}


def num_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the results depend on."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def machine_facts() -> dict[str, Any]:
    """Processor, cores, GPU, operating system and library versions."""
    return {
        "processor": _processor_name(),
        "cores": num_cores(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(),
        **library_versions(),
    }


def known_peak(device_name: str, precision: str, tf32: bool) -> float | None:
    """Peak operations per second of a device by its CUDA name; None if it is not in `GPUS`."""
    return next((gpu.peak(precision, tf32) for gpu in GPUS.values() if gpu.device_name in device_name), None)


def peak_memory() -> int:
    """Peak memory in bytes: allocated on the GPU, or resident in this process if there is no GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor_name() -> str:
    path = Path("/proc/cpuinfo")
    facts = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.*)", facts, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()
