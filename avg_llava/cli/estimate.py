"""The command that says what a run takes before it starts."""

import argparse
from pathlib import Path
from typing import Any

from avg_llava.cli.options import FINE, JSON, add_command, at_least_one, tell

GPU_NAMES = ("a100", "a100-40gb", "h100", "h200", "l40s", "rtx4090")
ZERO_NAMES = ("none", "0", "1", "2", "3", "3-offload")


def estimate(arguments: argparse.Namespace) -> int:
    """Estimates memory per GPU, operations and hours of a training run, without loading weights."""
    from avg_llava.planning.estimate import Request, table_lines
    from avg_llava.planning.estimate import estimate as estimate_run

    request = Request(
        num_gpus=arguments.gpus,
        gpu=arguments.gpu,
        zero=arguments.zero,
        mfu=arguments.mfu,
        num_samples=arguments.num_samples,
        image_size=arguments.image_size,
        num_prompt_tokens=arguments.prompt_tokens,
        num_answer_tokens=arguments.answer_tokens,
        model_of=arguments.model_of,
    )
    result = estimate_run(arguments.config, request)
    tell(arguments, result, "\n".join(table_lines(result)))
    return FINE


def _image_size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` as (height, width)."""
    width, times, height = text.partition("x")
    if not times or not width.isdigit() or not height.isdigit() or int(width) < 1 or int(height) < 1:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 640x480, got {text!r}")
    return int(height), int(width)


def add_estimate(commands: Any) -> None:
    """Adds the command of this module."""
    number = {"type": at_least_one, "metavar": "N"}
    add_command(
        commands,
        "estimate",
        estimate,
        "avg-llava estimate --config configs/vicuna-7b/stage3.yaml --gpus 8 --gpu h100",
        [
            (("--config",), {"type": Path, "required": True, "metavar": "FILE", "help": "YAML file of any stage"}),
            (("--gpus",), {**number, "default": 8, "help": "GPUs of the run (default 8)"}),
            (("--gpu",), {"choices": GPU_NAMES, "default": "h100", "help": "their kind (default h100)"}),
            (
                ("--zero",),
                {"choices": ZERO_NAMES, "help": "ZeRO stage that the heading names (default: the configuration's)"},
            ),
            (
                ("--mfu",),
                {
                    "type": float,
                    "default": 0.4,
                    "metavar": "X",
                    "help": "model operations per second as a share of the GPU's, for the hours (default 0.4)",
                },
            ),
            (("--num-samples",), {**number, "help": "samples of an epoch (default: counted, or known by file name)"}),
            (
                ("--image-size",),
                {"type": _image_size, "metavar": "WIDTHxHEIGHT", "help": "of every image, instead of the data's"},
            ),
            (("--prompt-tokens",), {**number, "help": "text tokens of every prompt, instead of the data's"}),
            (("--answer-tokens",), {**number, "help": "tokens of every answer, instead of the data's"}),
            (
                ("--model-of",),
                {
                    "type": Path,
                    "metavar": "FILE",
                    "help": "YAML file of the stage that makes model.start, or of stage 1, where the start is not "
                    "there (default: found by its output.dir in the folders around the configuration)",
                },
            ),
            JSON,
        ],
    )
