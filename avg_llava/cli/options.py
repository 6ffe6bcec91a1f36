"""What all commands share: how one is declared, and how it answers."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avg_llava.inference.budget import Budget
    from avg_llava.inference.pipeline import Pipeline

FINE, FAILED, INTERRUPTED = 0, 1, 130


def add_group(commands: Any, name: str, description: str, example: str) -> Any:
    """A command that has commands of its own: where to add them."""
    parser = commands.add_parser(
        name,
        help=description,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser.add_subparsers(title="commands", metavar="<command>", required=True)


def add_command(
    commands: Any, name: str, run: Any, example: str, arguments: Sequence[tuple[tuple[str, ...], dict[str, Any]]]
) -> None:
    """A command with its help, an example and `--debug`; the function's docstring is its description."""
    description = run.__doc__.strip()
    parser = commands.add_parser(
        name,
        help=description,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flags, options in arguments:
        parser.add_argument(*flags, **options)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def at_least_one(text: str) -> int:
    """The type of an argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


CHECKPOINT = (("--model",), {"required": True, "metavar": "DIR", "help": "checkpoint folder or hub id"})
DTYPE = (
    ("--dtype",),
    {"choices": ["float32", "bfloat16", "float16"], "help": "of weights (default: as in the checkpoint)"},
)
STATIC_CACHE = (
    ("--static-cache",),
    {"action": "store_true", "help": "write answers with a cache of fixed size; compiles decoding on a GPU"},
)
MODEL: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    CHECKPOINT,
    (("--device",), {"default": "auto", "help": "auto, cpu or cuda (default auto)"}),
    DTYPE,
    (
        ("--quantization",),
        {"choices": ["8bit", "4bit"], "help": "of the language model's weights, through bitsandbytes"},
    ),
    STATIC_CACHE,
]
"""Which model answers, and how its weights are held; for :func:`load_pipeline`."""

ANSWERING: list[tuple[tuple[str, ...], dict[str, Any]]] = [
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
    (("--max-new-tokens",), {"type": at_least_one, "default": 128, "metavar": "N", "help": "longest answer (128)"}),
]
"""How answers are found; for :func:`budget_of`."""

JSON = (("--json",), {"action": "store_true", "help": "print JSON for a program to read"})


def tell(arguments: argparse.Namespace, facts: Any, text: str) -> None:
    """Prints a command's result: JSON where it was asked for, else text."""
    print(json.dumps(facts, indent=2) if arguments.json else text)


def load_pipeline(arguments: argparse.Namespace) -> "Pipeline":
    """Loads the model that the arguments `MODEL` name."""
    from avg_llava.inference.pipeline import Pipeline

    hide_bars_from_files()
    device = pick_device(arguments.device)
    return Pipeline.load(
        arguments.model,
        dtype=arguments.dtype,
        device=device,
        quantization=arguments.quantization,
        static_cache=arguments.static_cache,
    )


def budget_of(arguments: argparse.Namespace) -> "Budget":
    """How levels are found, as a user said by `ANSWERING`."""
    from avg_llava.inference.budget import Budget

    return Budget(arguments.granularity, arguments.token_cost, arguments.max_visual_tokens)


def hide_bars_from_files() -> None:
    """Progress bars of loading are for people: where errors go to a file or a program, one line stays one line."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


def pick_device(name: str) -> str:
    """The device that a user's choice means."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available here; use --device cpu")
    return name
