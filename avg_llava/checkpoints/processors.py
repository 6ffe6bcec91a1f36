"""Comparison of a checkpoint's processor with its model."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL.Image import Resampling
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from avg_llava.checkpoints.weight_files import CheckpointError
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.processing import AvgLlavaProcessor


def check_processor(processor: AvgLlavaProcessor, config: AvgLlavaConfig, folder: Path) -> None:
    """Checks that a processor makes the inputs that a model takes.

    Args:
        processor: The processor.
        config: Configuration of the model.
        folder: Folder of the processor's settings, for messages.

    Raises:
        CheckpointError: A setting is of the wrong kind, or differs from the model's; it is named.
    """
    names = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)
    file = next((folder / name for name in names if (folder / name).is_file()), folder)
    for problem in _problems(processor, config):
        raise CheckpointError(f"{file}: {problem}")
    longest: Any = processor.tokenizer.model_max_length
    if type(longest) not in (int, float) or not longest > 0:
        raise CheckpointError(f"the tokenizer in {folder}: model_max_length is {longest!r}, not a number above 0")


def _problems(processor: AvgLlavaProcessor, config: AvgLlavaConfig) -> Iterator[str]:
    images: Any = processor.image_processor
    crop = config.crop_size
    if processor.image_token_id != config.image_token_id or type(processor.image_token_id) is not int:
        yield f"image_token_id is {processor.image_token_id!r}, and that of the model is {config.image_token_id}"
    pinpoints = images.image_grid_pinpoints
    pairs = isinstance(pinpoints, (list, tuple)) and all(isinstance(pair, (list, tuple)) for pair in pinpoints)
    if not pairs or [list(pair) for pair in pinpoints] != config.image_grid_pinpoints:
        yield f"image_grid_pinpoints is {pinpoints!r}, and that of the model is {config.image_grid_pinpoints}"
    for key, sides in (("size", ("shortest_edge", "height", "width")), ("crop_size", ("height", "width"))):
        found = dict(getattr(images, key) or {})
        values = [found[side] for side in sides if found.get(side) is not None]
        if not values or any(value != crop for value in values):
            yield f"{key} is {found}, and the crops of the model have {crop} px"
    if isinstance(images.resample, bool) or images.resample not in list(Resampling):
        yield f"resample is {images.resample!r}, none of Pillow's filters 0 to 5"
    for key in ("do_rescale", "do_normalize"):
        if not isinstance(getattr(images, key), bool):
            yield f"{key} is {getattr(images, key)!r}; true and false are supported"
    if images.do_rescale and not _is_number(images.rescale_factor):
        yield f"rescale_factor is {images.rescale_factor!r}, not a number"
    for key in ("image_mean", "image_std") if images.do_normalize else ():
        value = getattr(images, key)
        if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(map(_is_number, value)):
            yield f"{key} is {value!r}, not three numbers"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
