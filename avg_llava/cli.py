"""`avg-llava <command>`: argument parsing, and one small function per command.

What a command needs is imported inside its function, so that help and wrong usage answer at once.
Exit codes: 0 fine, 1 failed, 2 wrong usage. Results go to standard output, everything else to standard error.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

FINE, FAILED, INTERRUPTED = 0, 1, 130


def train(arguments: argparse.Namespace) -> int:
    """Trains one stage, in this process or as one rank of a launcher's."""
    from avg_llava.training import run

    return run.main([str(arguments.config), *arguments.overrides])


def generate(arguments: argparse.Namespace) -> int:
    """Answers one question."""
    from avg_llava.evaluation.predictor import Predictor, Request
    from avg_llava.model.loading import load

    _hide_bars_from_files()
    model, processor = load(arguments.model)
    predictor = Predictor(model.to(_device(arguments.device)), processor)
    request = Request(arguments.prompt, tuple(arguments.image or ()))
    (prediction,) = predictor.predict(
        [request],
        granularity=arguments.granularity,
        token_cost=arguments.token_cost,
        max_new_tokens=arguments.max_new_tokens,
    )
    if not arguments.json:
        print(prediction.text)
        return FINE
    probabilities = None
    if prediction.router_probs is not None:
        levels = list(map(str, predictor.granularities))
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
    _hide_bars_from_files()
    model, processor = load(arguments.source)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    _tell(
        arguments,
        {"output": str(output), "parameters": sum(parameter.numel() for parameter in model.parameters())},
        f"wrote {output}",
    )
    return FINE


def mini_data(arguments: argparse.Namespace) -> int:
    """Draws the mini world."""
    from avg_llava.mini.world import write_world

    manifest = write_world(arguments.output, seed=arguments.seed)
    _tell(arguments, manifest, f"the mini world is in {arguments.output}")
    return FINE


def mini_benchmarks(arguments: argparse.Namespace) -> int:
    """Draws twelve small benchmarks in the published formats."""
    from avg_llava.mini.benchmarks import write_benchmarks

    manifest = write_benchmarks(arguments.output, seed=arguments.seed)
    _tell(arguments, manifest, f"the benchmarks are in {arguments.output}")
    return FINE


def mini_pretrain(arguments: argparse.Namespace) -> int:
    """Makes the mini backbones anew."""
    from avg_llava.mini.backbones import pretrain
    from avg_llava.mini.recipe import Recipe

    pretrain(arguments.output, Recipe(seed=arguments.seed))
    _tell(arguments, {"output": str(arguments.output)}, f"the backbones are in {arguments.output}")
    return FINE


def mini_claims(arguments: argparse.Namespace) -> int:
    """Compares all ways of choosing a level, and writes the report."""
    from avg_llava.evaluation.report import table_lines
    from avg_llava.mini.comparison import compare

    output = arguments.output or arguments.runs / "report"
    report = compare(arguments.runs, arguments.data, output, arguments.token_cost, arguments.workers)
    _tell(arguments, report, "\n".join([*table_lines(report), "", f"report: {output / 'index.html'}"]))
    held = all(claim["held"] for claim in report["claims"])
    return FINE if held or not arguments.check else FAILED


def _tell(arguments: argparse.Namespace, facts: Any, text: str) -> None:
    print(json.dumps(facts, indent=2) if arguments.json else text)


def _hide_bars_from_files() -> None:
    """Progress bars of loading are for people: where errors go to a file or a program, one line stays one line."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available here; use --device cpu")
    return name


# ---- parsing ------------------------------------------------------------------------------------------------------


def _add(
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


_JSON = (("--json",), {"action": "store_true", "help": "print JSON for a program to read"})


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
    _add(
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
    _add(
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
            (("--max-new-tokens",), {"type": int, "default": 128, "metavar": "N", "help": "longest answer (128)"}),
            (("--device",), {"default": "auto", "help": "auto, cpu or cuda (default auto)"}),
            _JSON,
        ],
    )
    _add(
        commands,
        "convert",
        convert,
        "avg-llava convert checkpoints/AVG-LLaVA checkpoints/avg-llava-7b",
        [
            (("source",), {"metavar": "SOURCE", "help": "checkpoint in original or transformers format"}),
            (("output",), {"type": Path, "metavar": "OUTPUT", "help": "folder to write, new or empty"}),
            _JSON,
        ],
    )
    mini = commands.add_parser(
        "mini",
        help="The drawn world of the quickstart.",
        description="The drawn world of the quickstart.",
        epilog="example:\n  avg-llava mini data --output playground/data/mini",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_mini(mini.add_subparsers(title="commands", metavar="<command>", required=True))
    return parser


def _add_mini(commands: Any) -> None:
    seed = (("--seed",), {"type": int, "default": 0, "metavar": "N", "help": "of everything random (default 0)"})
    output = (("--output",), {"type": Path, "required": True, "metavar": "DIR", "help": "folder to write"})
    _add(commands, "data", mini_data, "avg-llava mini data --output playground/data/mini", [output, seed, _JSON])
    example = "avg-llava mini benchmarks --output playground/data/benchmarks"
    _add(commands, "benchmarks", mini_benchmarks, example, [output, seed, _JSON])
    _add(commands, "pretrain", mini_pretrain, "avg-llava mini pretrain --output backbones", [output, seed, _JSON])
    _add(
        commands,
        "claims",
        mini_claims,
        "avg-llava mini claims --runs runs/mini --data playground/data/mini --check",
        [
            (
                ("--runs",),
                {"type": Path, "default": Path("runs/mini"), "metavar": "DIR", "help": "folder with stage1 to stage4"},
            ),
            (
                ("--data",),
                {"type": Path, "default": Path("playground/data/mini"), "metavar": "DIR", "help": "the mini world"},
            ),
            (("--output",), {"type": Path, "metavar": "DIR", "help": "the report (default <runs>/report)"}),
            (
                ("--token-cost",),
                {
                    "type": float,
                    "metavar": "X",
                    "help": "the price at which the router is judged (default: chosen on training data)",
                },
            ),
            (("--workers",), {"type": int, "metavar": "N", "help": "processes (default: one per core, one per GPU)"}),
            (("--check",), {"action": "store_true", "help": "fail if a claim does not hold"}),
            _JSON,
        ],
    )


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
        message += "; it belongs to an extra: pip install -e '.[train,eval]'"
    return message


if __name__ == "__main__":
    sys.exit(main())
