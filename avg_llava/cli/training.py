"""Commands that train."""

import argparse
from pathlib import Path
from typing import Any

from avg_llava.cli.parsing import add_command


def train(arguments: argparse.Namespace) -> int:
    """Trains one stage, in this process or as one rank of a launcher's."""
    from avg_llava.training import run

    return run.main([str(arguments.config), *arguments.overrides])


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
