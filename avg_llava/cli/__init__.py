"""`avg-llava <command>`: one small function per command, grouped in modules.

What a command needs is imported inside its function, so that help and wrong usage answer at once.
Exit codes: 0 fine, 1 failed, 2 wrong usage. Results go to standard output, everything else to standard error.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from avg_llava.cli.bench import add_bench
from avg_llava.cli.demo import add_demo
from avg_llava.cli.estimate import add_estimate
from avg_llava.cli.evaluation import add_evaluation
from avg_llava.cli.export import add_export
from avg_llava.cli.inference import add_inference
from avg_llava.cli.mini import add_mini
from avg_llava.cli.options import FAILED, INTERRUPTED
from avg_llava.cli.report import add_report
from avg_llava.cli.serving import add_serving
from avg_llava.cli.training import add_training


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="avg-llava",
        description="LLaVA-NeXT that picks its visual granularity from the image and the instruction.",
        epilog="example:\n  avg-llava generate --model runs/mini/stage4 --image cat.png --prompt 'What is this?'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    add_training(commands)
    add_estimate(commands)
    add_inference(commands)
    add_export(commands)
    add_demo(commands)
    add_serving(commands)
    add_evaluation(commands)
    add_report(commands)
    add_mini(commands)
    add_bench(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code; wrong usage leaves with 2 from the parser.
    """
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("avg_llava").setLevel(logging.INFO)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if arguments.debug:
            raise
        print(f"avg-llava: {_one_line(error)}", file=sys.stderr)
        return FAILED
    return code


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        message += "; it belongs to an extra: pip install -e '.[train,eval,serve,demo]'"
    return message
