"""The command that serves the web page."""

import argparse
import os
from pathlib import Path
from typing import Any

from avg_llava.cli.options import FINE, MODEL, add_command, load_pipeline

_SHIPPED = Path(__file__).parent.parent / "mini" / "checkpoint"


def demo(arguments: argparse.Namespace) -> int:
    """Serves a web page that answers questions about images and shows what the router chose."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
    from avg_llava.serving.demo import serve_page, wait_for_signal

    with serve_page(load_pipeline(arguments).predictor, arguments.host, arguments.port) as address:
        print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
        wait_for_signal()
    return FINE


def add_demo(commands: Any) -> None:
    """Adds the command of this module."""
    add_command(
        commands,
        "demo",
        demo,
        "avg-llava demo --model runs/mini/stage4 --port 7860",
        [
            (
                ("--model",),
                {"default": str(_SHIPPED), "metavar": "DIR", "help": "checkpoint (default: the shipped mini model)"},
            ),
            (
                ("--host",),
                {
                    "default": "127.0.0.1",
                    "metavar": "ADDRESS",
                    "help": "where to listen (default 127.0.0.1: this machine only; 0.0.0.0: whoever can reach it)",
                },
            ),
            (("--port",), {"type": int, "default": 7860, "metavar": "N", "help": "port (7860)"}),
            *MODEL[1:],
        ],
    )
