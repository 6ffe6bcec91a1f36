"""`torch.compile` for the layers of vision tower and language model.

Off by default: on a CPU it costs half a minute to compile, and a step is then no faster. Losses and gradients are those
of the layers as they are, to rounding.
"""

import importlib.util
import os
import shutil
from collections.abc import Mapping
from typing import Any

from avg_llava.common.settings import ConfigError
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration


def check_compilation(deepspeed: Mapping[str, Any] | None, use_cpu: bool) -> None:
    """Refuse to compile where it cannot be done.

    Args:
        deepspeed: the parsed DeepSpeed file, or None.
        use_cpu: whether the run computes on the CPU.

    Raises:
        ConfigError: under ZeRO-3, or without a compiler.
    """
    if deepspeed is not None and deepspeed.get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            "runtime.compile: under ZeRO-3, where weights come and go, layers are compiled over and over; choose "
            "configs/deepspeed/zero2.json, or set it to false"
        )
    if use_cpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError(
            "runtime.compile needs a C++ compiler on a CPU (g++, or the one that CXX names); install one, or set it to "
            "false"
        )
    if not use_cpu and importlib.util.find_spec("triton") is None:
        raise ConfigError("runtime.compile needs triton on a GPU; install it, or set it to false")


def compile_layers(model: AvgLlavaForConditionalGeneration) -> None:
    """Compile each layer in place, at its first call; names of weights stay as they are.

    Layers are compiled one by one because they are alike: one compilation serves all of a part.
    """
    for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
        layer.compile()
