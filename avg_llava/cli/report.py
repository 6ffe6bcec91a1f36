"""The command that makes tables and figures."""

import argparse
from pathlib import Path
from typing import Any

from avg_llava.cli.options import FINE, JSON, add_command, tell


def report(arguments: argparse.Namespace) -> int:
    """Makes the paper's tables and figures from result files, published rows beside measured ones."""
    from avg_llava.reports.paper import write_paper_report

    written = write_paper_report(arguments.results, arguments.against, arguments.output)
    tell(arguments, written.as_json(), f"{written.as_text()}\nreport: {written.files[0]}")
    return FINE


def add_report(commands: Any) -> None:
    """Adds the command of this module."""
    files = {"type": Path, "nargs": "+", "metavar": "RESULT"}
    add_command(
        commands,
        "report",
        report,
        "avg-llava report runs/eval/gqa.json runs/eval/mme.json --output runs/report",
        [
            (("results",), {**files, "help": "result of `avg-llava evaluate`, or report.json of the mini world"}),
            (
                ("--against",),
                {
                    **files,
                    "default": (),
                    "help": "results of another run: paired tests for each benchmark that both have",
                },
            ),
            (
                ("--output",),
                {
                    "type": Path,
                    "default": Path("runs/report"),
                    "metavar": "DIR",
                    "help": "folder for index.html, tables (.md, .tex) and figures (.png, .svg) (runs/report)",
                },
            ),
            JSON,
        ],
    )
