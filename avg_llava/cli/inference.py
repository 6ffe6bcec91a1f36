"""Commands that ask a model."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from avg_llava.cli.options import (
    FINE,
    AnswerOptions,
    Command,
    Count,
    ModelOptions,
    Outcome,
    ReportingCommand,
    command,
    unset,
)

if TYPE_CHECKING:
    from avg_llava.inference.answers import Answer


@command("avg-llava generate --model runs/mini/stage4 --image cat.png --prompt 'What is this?' --json")
class Generate(ReportingCommand):
    """Answers one question, or a file of questions."""

    loading: OmitArgPrefixes[ModelOptions]
    image: UseAppendAction[tuple[Path, ...]] = ()
    """Image file that the prompt is about."""
    prompt: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="(this or --input)")] = None
    """The question."""
    input: Annotated[Path | None, unset("none")] = None
    """JSON Lines file of questions, instead of --prompt. A line has the keys prompt and image (a path, a list of paths,
    or null), and optionally id, granularity, token_cost and max_visual_tokens."""
    output: Annotated[Path | None, unset("none")] = None
    """JSON Lines file for the answers to --input; answers that it already contains are kept."""
    image_root: Annotated[Path | None, unset("the folder of --input")] = None
    """Folder of the images of --input."""
    batch_size: Count = 8
    """Questions per batch."""
    answering: OmitArgPrefixes[AnswerOptions] = AnswerOptions()

    def compute(self) -> Outcome:
        if (self.prompt is None) == (self.input is None) or (self.input is None) != (self.output is None):
            raise ValueError("give --prompt for one question, or --input and --output for a file of them")
        from avg_llava.inference.answers import Decoding, Request
        from avg_llava.inference.question_files import answer_file, read_questions

        pipeline = self.loading.load()
        budget, decoding = self.answering.budget(), Decoding(self.answering.max_new_tokens)
        if self.input is None or self.output is None:
            assert self.prompt is not None
            (answer,) = pipeline.generate_batch([Request(self.prompt, self.image)], budget, decoding)
            return Outcome(to_json(answer, pipeline.predictor.granularities), answer.text)
        questions = read_questions(self.input, self.image_root or self.input.parent, budget)
        num_failures = answer_file(pipeline.predictor, questions, self.output, decoding, self.batch_size)
        facts = {"questions": len(questions), "failures": num_failures, "output": str(self.output)}
        errors = f", {num_failures} failed: see {self.output.with_suffix('.errors.jsonl')}" if num_failures else ""
        text = f"answered {len(questions) - num_failures} questions in {self.output}{errors}"
        return Outcome(facts, text, failed=num_failures > 0)


@command("avg-llava chat --model runs/mini/stage4 --image cat.png")
class Chat(Command):
    """Chats about images in the terminal; /help lists its commands."""

    loading: OmitArgPrefixes[ModelOptions]
    image: UseAppendAction[tuple[Path, ...]] = ()
    """Image file to start with."""
    answering: OmitArgPrefixes[AnswerOptions] = AnswerOptions()

    def run(self) -> int:
        from avg_llava.inference.answers import Decoding
        from avg_llava.serving import chat

        pipeline = self.loading.load()
        decoding = Decoding(self.answering.max_new_tokens)
        session = chat.Chat(pipeline.predictor, self.answering.budget(), decoding, print)
        session.run(f"/image {path}" for path in self.image)
        session.run(_input_lines())
        return FINE


def to_json(answer: "Answer", granularities: Sequence[int]) -> dict[str, Any]:
    """An answer for JSON; a prompt with one image has scalars in place of lists over images."""
    probabilities = None
    if answer.router_probs is not None:
        probabilities = [dict(zip(map(str, granularities), row, strict=True)) for row in answer.router_probs]
    fields = asdict(answer)
    fields["milliseconds"] = fields.pop("timings")
    return fields | {"granularity": _squeeze(answer.granularity), "router_probs": _squeeze(probabilities)}


def _squeeze(per_image: Sequence[Any] | None) -> Any:
    """The value itself for one image, None for no image, else the list over images."""
    if not per_image:
        return None
    return per_image[0] if len(per_image) == 1 else list(per_image)


def _input_lines() -> Iterator[str]:
    """Lines of standard input, with a prompt and line editing in a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (gives `input` a history)

    print("/help lists commands, /quit leaves")
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")
