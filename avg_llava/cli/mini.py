"""Commands of the mini world."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from avg_llava.cli.options import FAILED, FINE, JSON, add_command, add_group, tell


def mini_data(arguments: argparse.Namespace) -> int:
    """Draws the mini world."""
    from avg_llava.mini.world import write_world

    manifest = write_world(arguments.output, seed=arguments.seed)
    tell(arguments, manifest, f"the mini world is in {arguments.output}")
    return FINE


def mini_benchmarks(arguments: argparse.Namespace) -> int:
    """Draws twelve small benchmarks in the published formats."""
    from avg_llava.mini.benchmarks import write_benchmarks

    manifest = write_benchmarks(arguments.output, seed=arguments.seed)
    tell(arguments, manifest, f"the benchmarks are in {arguments.output}")
    return FINE


def mini_pretrain(arguments: argparse.Namespace) -> int:
    """Makes the mini backbones anew."""
    from avg_llava.mini.backbones import pretrain
    from avg_llava.mini.recipe import Recipe

    pretrain(arguments.output, Recipe(seed=arguments.seed))
    tell(arguments, {"output": str(arguments.output)}, f"the backbones are in {arguments.output}")
    return FINE


def mini_claims(arguments: argparse.Namespace) -> int:
    """Compares all ways of choosing a level, and writes the report."""
    from avg_llava.mini.comparison import compare
    from avg_llava.reports.mini import table_lines

    output = arguments.output or arguments.runs / "report"
    report = compare(arguments.runs, arguments.data, output, arguments.token_cost, arguments.workers)
    tell(arguments, report, "\n".join([*table_lines(report), "", f"report: {output / 'index.html'}"]))
    held = all(claim["held"] for claim in report["claims"])
    return FINE if held or not arguments.check else FAILED


def mini_routers(arguments: argparse.Namespace) -> int:
    """Compares routers of one language model, as ablations of router training give them."""
    from avg_llava.mini.routers import compare_routers
    from avg_llava.reports.mini import table_lines

    rows = compare_routers(
        arguments.model, arguments.routers, arguments.data, arguments.answers, num_workers=arguments.workers
    )
    report: dict[str, Any] = {"rows": [dataclasses.asdict(row) for row in rows], "claims": []}
    tell(arguments, report, "\n".join(table_lines(report)).rstrip())
    return FINE


def add_mini(commands: Any) -> None:
    """Adds the commands of this module."""
    mini = add_group(
        commands, "mini", "The drawn world of the quickstart.", "avg-llava mini data --output playground/data/mini"
    )
    _add_commands(mini)


def _add_commands(commands: Any) -> None:
    seed = (("--seed",), {"type": int, "default": 0, "metavar": "N", "help": "of everything random (default 0)"})
    output = (("--output",), {"type": Path, "required": True, "metavar": "DIR", "help": "folder to write"})
    add_command(commands, "data", mini_data, "avg-llava mini data --output playground/data/mini", [output, seed, JSON])
    data = (
        ("--data",),
        {"type": Path, "default": Path("playground/data/mini"), "metavar": "DIR", "help": "the mini world"},
    )
    workers = (("--workers",), {"type": int, "metavar": "N", "help": "processes (default: one per core, one per GPU)"})
    example = "avg-llava mini benchmarks --output playground/data/benchmarks"
    add_command(commands, "benchmarks", mini_benchmarks, example, [output, seed, JSON])
    add_command(commands, "pretrain", mini_pretrain, "avg-llava mini pretrain --output backbones", [output, seed, JSON])
    add_command(
        commands,
        "claims",
        mini_claims,
        "avg-llava mini claims --runs runs/mini --data playground/data/mini --check",
        [
            (
                ("--runs",),
                {"type": Path, "default": Path("runs/mini"), "metavar": "DIR", "help": "folder with stage1 to stage4"},
            ),
            data,
            (("--output",), {"type": Path, "metavar": "DIR", "help": "the report (default <runs>/report)"}),
            (
                ("--token-cost",),
                {
                    "type": float,
                    "metavar": "X",
                    "help": "the price at which the router is judged (default: chosen on training data)",
                },
            ),
            workers,
            (("--check",), {"action": "store_true", "help": "fail if a claim does not hold"}),
            JSON,
        ],
    )
    add_command(
        commands,
        "routers",
        mini_routers,
        "avg-llava mini routers --model avg_llava/mini/checkpoint --answers runs/answers runs/a runs/b",
        [
            (("routers",), {"type": Path, "nargs": "+", "metavar": "DIR", "help": "checkpoint with a router"}),
            (
                ("--model",),
                {"type": Path, "required": True, "metavar": "DIR", "help": "checkpoint that answers, at all levels"},
            ),
            (
                ("--answers",),
                {"type": Path, "required": True, "metavar": "DIR", "help": "folder that its answers are kept in"},
            ),
            data,
            workers,
            JSON,
        ],
    )
