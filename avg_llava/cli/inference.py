"""Commands that load a model and use or rewrite it."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avg_llava.cli.parsing import FINE, JSON, add_command, at_least_one, hide_bars_from_files, pick_device, tell


def generate(arguments: argparse.Namespace) -> int:
    """Answers one question."""
    from avg_llava.model.loading import load

    hide_bars_from_files()
    model, _ = load(arguments.model, device=pick_device(arguments.device))
    prediction = model.ask(
        arguments.image,
        arguments.prompt,
        granularity=arguments.granularity,
        token_cost=arguments.token_cost,
        max_visual_tokens=arguments.max_visual_tokens,
        max_new_tokens=arguments.max_new_tokens,
    )
    if not arguments.json:
        print(prediction.text)
        return FINE
    probabilities = None
    if prediction.router_probs is not None:
        levels = list(map(str, model.config.granularities))
        probabilities = [dict(zip(levels, row, strict=True)) for row in prediction.router_probs]
    result = {
        "text": prediction.text,
        "granularity": _single(prediction.granularity),
        "router_probs": _single(probabilities),
        "num_visual_tokens": prediction.num_visual_tokens,
        "milliseconds": asdict(prediction.timings),
    }
    print(json.dumps(result, indent=2, ensure_ascii=False))
    return FINE


def _single(per_image: Sequence[Any] | None) -> Any:
    """The value itself where there is one image, null where there is none, else the list over images."""
    if not per_image:
        return None
    return per_image[0] if len(per_image) == 1 else list(per_image)


def convert(arguments: argparse.Namespace) -> int:
    """Rewrites a checkpoint in this project's transformers format."""
    from avg_llava.model.loading import load

    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; name another one, or remove it")
    hide_bars_from_files()
    model, processor = load(arguments.source)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    tell(
        arguments,
        {"output": str(output), "parameters": sum(parameter.numel() for parameter in model.parameters())},
        f"wrote {output}",
    )
    return FINE


def add_inference(commands: Any) -> None:
    """Adds the commands of this module."""
    add_command(
        commands,
        "generate",
        generate,
        "avg-llava generate --model runs/mini/stage4 --image cat.png --prompt 'What is this?' --json",
        [
            (("--model",), {"required": True, "metavar": "DIR", "help": "checkpoint folder or hub id"}),
            (
                ("--image",),
                {"type": Path, "action": "append", "metavar": "FILE", "help": "image; again for several, or none"},
            ),
            (("--prompt",), {"required": True, "metavar": "TEXT", "help": "what to ask"}),
            (
                ("--granularity",),
                {"type": int, "metavar": "N", "help": "visual tokens per crop; without it the router chooses"},
            ),
            (
                ("--token-cost",),
                {
                    "type": float,
                    "default": 0.0,
                    "metavar": "X",
                    "help": "the router's price in nats per doubling of visual tokens (default 0, the paper)",
                },
            ),
            (
                ("--max-visual-tokens",),
                {"type": at_least_one, "metavar": "N", "help": "limit on the visual tokens of all images together"},
            ),
            (("--max-new-tokens",), {"type": int, "default": 128, "metavar": "N", "help": "longest answer (128)"}),
            (("--device",), {"default": "auto", "help": "auto, cpu or cuda (default auto)"}),
            JSON,
        ],
    )
    add_command(
        commands,
        "convert",
        convert,
        "avg-llava convert checkpoints/AVG-LLaVA checkpoints/avg-llava-7b",
        [
            (("source",), {"metavar": "SOURCE", "help": "checkpoint in original or transformers format"}),
            (("output",), {"type": Path, "metavar": "OUTPUT", "help": "folder to write, new or empty"}),
            JSON,
        ],
    )
