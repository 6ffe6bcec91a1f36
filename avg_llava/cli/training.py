"""Commands that train, and that prepare training."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avg_llava.cli.parsing import FINE, JSON, add_command, at_least_one, hide_bars_from_files, tell


def train(arguments: argparse.Namespace) -> int:
    """Trains one stage, in this process or as one rank of a launcher's."""
    from avg_llava.training import run

    return run.main([str(arguments.config), *arguments.overrides])


def feedback(arguments: argparse.Namespace) -> int:
    """Collects the language model's feedback that stage 4 learns from, once for any number of runs."""
    from avg_llava.training.config import load_config
    from avg_llava.training.feedback import collect

    hide_bars_from_files()
    collection = collect(load_config(arguments.config), arguments.output, arguments.num_processes)
    counts = ", ".join(f"{count} {status}" for status, count in collection.counts.items())
    text = f"the feedback on {collection.num_samples} samples is in {arguments.output}: {counts}"
    if collection.num_missing_shards:
        text = (
            f"this machine's share of the feedback is in {arguments.output}: {counts}; {collection.num_missing_shards} "
            f"of {collection.num_shards} shards are left to other machines"
        )
    tell(arguments, {"output": str(arguments.output), **asdict(collection)}, text)
    return FINE


def add_training(commands: Any) -> None:
    """Adds the commands of this module."""
    add_command(
        commands,
        "train",
        train,
        "avg-llava train configs/mini/stage1.yaml --optim.lr 5e-4",
        [
            (("config",), {"type": Path, "help": "YAML file of the stage"}),
            (
                ("overrides",),
                {
                    "nargs": argparse.REMAINDER,
                    "metavar": "--key.subkey value ...",
                    "help": "over values of the YAML file",
                },
            ),
        ],
    )
    processes = (
        ("--num-processes",),
        {"type": at_least_one, "metavar": "N", "help": "processes (default: one per GPU, without any one per core)"},
    )
    add_command(
        commands,
        "feedback",
        feedback,
        "avg-llava feedback --config configs/vicuna-7b/stage4.yaml --output runs/vicuna-7b/feedback --num-processes 8",
        [
            (("--config",), {"type": Path, "required": True, "metavar": "FILE", "help": "YAML file of stage 4"}),
            (
                ("--output",),
                {
                    "type": Path,
                    "required": True,
                    "metavar": "DIR",
                    "help": "folder of the store; one that was begun is continued",
                },
            ),
            processes,
            JSON,
        ],
    )
