"""Commands that load a model and use or rewrite it."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avg_llava.cli.options import (
    ANSWERING,
    FAILED,
    FINE,
    JSON,
    MODEL,
    add_command,
    at_least_one,
    budget_of,
    hide_bars_from_files,
    load_pipeline,
    tell,
)

if TYPE_CHECKING:
    from avg_llava.inference.answers import Answer


def generate(arguments: argparse.Namespace) -> int:
    """Answers one question, or a file of questions."""
    from avg_llava.inference.answers import Decoding, Request

    if (arguments.prompt is None) == (arguments.input is None) or (arguments.input is None) != (
        arguments.output is None
    ):
        raise ValueError("give --prompt for one question, or --input and --output for a file of them")
    pipeline = load_pipeline(arguments)
    budget = budget_of(arguments)
    decoding = Decoding(arguments.max_new_tokens)
    if arguments.input is None:
        request = Request(arguments.prompt, tuple(arguments.image or ()))
        (answer,) = pipeline.generate_batch([request], budget, decoding)
        tell(arguments, _told(answer, pipeline.predictor.granularities), answer.text)
        return FINE

    from avg_llava.inference.question_files import answer_file, read_questions

    questions = read_questions(arguments.input, arguments.image_root or arguments.input.parent, budget)
    num_failures = answer_file(pipeline.predictor, questions, arguments.output, decoding, arguments.batch_size)
    facts = {"questions": len(questions), "failures": num_failures, "output": str(arguments.output)}
    errors = f", {num_failures} not: see {arguments.output.with_suffix('.errors.jsonl')}" if num_failures else ""
    tell(arguments, facts, f"answered {len(questions) - num_failures} questions in {arguments.output}{errors}")
    return FAILED if num_failures else FINE


def chat(arguments: argparse.Namespace) -> int:
    """Talks about images in the terminal; /help lists what can be done besides asking."""
    from avg_llava.inference.answers import Decoding
    from avg_llava.serving.chat import Chat

    pipeline = load_pipeline(arguments)
    budget = budget_of(arguments)
    conversation = Chat(pipeline.predictor, budget, Decoding(arguments.max_new_tokens), print)
    for path in arguments.image or ():
        conversation.run([f"/image {path}"])
    conversation.run(_typed_lines())
    return FINE


def _typed_lines() -> Iterator[str]:
    """Lines of standard input, with a prompt and line editing where a person types them."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (gives `input` a history)

    print("/help lists commands, /quit leaves")
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def _told(answer: "Answer", granularities: Sequence[int]) -> dict[str, Any]:
    """An answer as JSON; values of a single image without a list around them."""
    probabilities = None
    if answer.router_probs is not None:
        probabilities = [dict(zip(map(str, granularities), row, strict=True)) for row in answer.router_probs]
    fields = asdict(answer)
    fields["milliseconds"] = fields.pop("timings")
    return fields | {"granularity": _single(answer.granularity), "router_probs": _single(probabilities)}


def _single(per_image: Sequence[Any] | None) -> Any:
    """The value itself where there is one image, null where there is none, else the list over images."""
    if not per_image:
        return None
    return per_image[0] if len(per_image) == 1 else list(per_image)


def convert(arguments: argparse.Namespace) -> int:
    """Rewrites a checkpoint in this project's transformers format."""
    from avg_llava.checkpoints.loading import load

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


_IMAGE = (
    ("--image",),
    {"type": Path, "action": "append", "metavar": "FILE", "help": "image; again for several, or none"},
)


def add_inference(commands: Any) -> None:
    """Adds the commands of this module."""
    add_command(
        commands,
        "generate",
        generate,
        "avg-llava generate --model runs/mini/stage4 --image cat.png --prompt 'What is this?' --json",
        [
            *MODEL,
            _IMAGE,
            (("--prompt",), {"metavar": "TEXT", "help": "what to ask"}),
            (
                ("--input",),
                {
                    "type": Path,
                    "metavar": "JSONL",
                    "help": "instead of --prompt: a file of questions, one a line, each with prompt, image (path, list "
                    "of paths, or none), and as it likes id, granularity, token_cost, max_visual_tokens",
                },
            ),
            (
                ("--output",),
                {"type": Path, "metavar": "JSONL", "help": "answers to --input; those that it holds are kept"},
            ),
            (
                ("--image-root",),
                {"type": Path, "metavar": "DIR", "help": "folder of the images of --input (default: its own)"},
            ),
            (("--batch-size",), {"type": at_least_one, "default": 8, "metavar": "N", "help": "questions at once (8)"}),
            *ANSWERING,
            JSON,
        ],
    )
    add_command(
        commands, "chat", chat, "avg-llava chat --model runs/mini/stage4 --image cat.png", [*MODEL, _IMAGE, *ANSWERING]
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
