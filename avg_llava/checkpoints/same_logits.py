"""Compares the logits of a checkpoint with those of its conversion."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, PreTrainedModel

from avg_llava.checkpoints.checkpoint import Checkpoint
from avg_llava.checkpoints.formats import open_checkpoint
from avg_llava.checkpoints.loading import instantiate
from avg_llava.checkpoints.weight_files import CheckpointError
from avg_llava.model.anyres import num_crops, num_visual_tokens
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration

TOLERANCE = 1e-5
"""Largest difference of logits, relative to the largest logit."""
NUM_TEXT_TOKENS = 12


def compare_logits(source: Checkpoint, folder: Path, is_llava_next: bool, dtype: torch.dtype) -> float:
    """The largest difference of the logits of a fixed prompt with a fixed image, relative to the largest logit.

    Both models compute in float32 with weights that were rounded to the output's data type, one after the other.
    Compared are the levels and the router that both have; of transformers' LLaVA-NeXT, the finest level.

    Args:
        source: The checkpoint.
        folder: Folder of its conversion.
        is_llava_next: The conversion is for transformers' LLaVA-NeXT.
        dtype: Data type of the weights of the conversion.

    Raises:
        CheckpointError: The difference is above TOLERANCE, or a logit is NaN or infinite.
    """
    config = source.config
    inputs = _inputs(config)
    levels, with_router = [config.granularities[-1]], False
    if not is_llava_next:
        output = open_checkpoint(folder)
        levels = [level for level in config.granularities if level in output.config.granularities]
        with_router = not source.fresh and not output.fresh

    def run(checkpoint: Checkpoint) -> list[Tensor]:
        return _run(
            lambda: instantiate(AvgLlavaForConditionalGeneration, checkpoint, dtype),
            lambda model: _levels(model, inputs, levels, with_router),
        )

    expected = run(source)
    if is_llava_next:
        found = _run(
            lambda: LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=dtype),
            lambda model: [_finest(model, inputs, config)],
        )
    else:
        found = run(output)
    largest = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        for name, logits in ((source.name, ours), ("the output", theirs)):
            if not logits.isfinite().all():
                raise CheckpointError(f"{name} gives logits that are NaN or infinite, so the output is not written")
        shared = min(ours.shape[-1], theirs.shape[-1])
        difference = (ours[..., :shared] - theirs[..., :shared]).abs().max()
        largest = max(largest, float(difference / ours.abs().max().clamp_min(torch.finfo(ours.dtype).tiny)))
    if not largest <= TOLERANCE:
        raise CheckpointError(
            f"the output gives other logits than {source.name} (largest difference {largest:.1e} of the largest "
            "logit), so it is not written"
        )
    return largest


def fits_in_memory(num_parameters: int) -> bool:
    """Returns True if the free memory holds a model in float32, with a fifth to spare."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * 1.2 * num_parameters < free


def _run(load: Callable[[], PreTrainedModel], compute: Callable[[Any], list[Tensor]]) -> list[Tensor]:
    """Results of a model in float32, which is freed afterwards."""
    with torch.inference_mode():
        results = compute(load().float().eval())
    gc.collect()
    return results


def _inputs(config: AvgLlavaConfig) -> dict[str, Tensor]:
    """A prompt of random tokens with one random image, one and a half crops high and two wide."""
    generator = torch.Generator().manual_seed(0)
    crop = config.crop_size
    size = (crop * 3 // 2, crop * 2)
    ids = torch.randint(
        0, min(config.image_token_id, config.text_config.vocab_size), (NUM_TEXT_TOKENS,), generator=generator
    )
    ids[NUM_TEXT_TOKENS // 3] = config.image_token_id
    return {
        "input_ids": ids[None],
        "pixel_values": torch.randn(1, num_crops(size, config), 3, crop, crop, generator=generator),
        "image_sizes": torch.tensor([size]),
    }


def _levels(model: Any, inputs: dict[str, Tensor], levels: list[int], with_router: bool) -> list[Tensor]:
    results = [model(**inputs, granularity=level).logits for level in levels]
    return [*results, model(**inputs).router_logits] if with_router else results


def _finest(model: Any, inputs: dict[str, Tensor], config: AvgLlavaConfig) -> Tensor:
    """Logits of transformers' model, whose prompts hold a placeholder for every visual token."""
    before, after = inputs["input_ids"][0].tensor_split([NUM_TEXT_TOKENS // 3])
    size = tuple(inputs["image_sizes"][0].tolist())
    number = num_visual_tokens(size, config.num_patches_per_side**2, config)
    ids = torch.cat([before, torch.full((number,), model.config.image_token_id), after[1:]])
    logits: Tensor = model(
        input_ids=ids[None], pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"]
    ).logits
    return logits
