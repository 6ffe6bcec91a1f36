"""Answers a file of questions into a file of answers; interrupted runs are resumed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from avg_llava.common.jsonl import JsonLines
from avg_llava.data.records import DataError, RawRecord, image_paths, read_records
from avg_llava.inference.answers import Answer, Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.predictor import Predictor
from avg_llava.model.images import load_image

_BUDGET_FIELDS = ("granularity", "token_cost", "max_visual_tokens")
_FIELDS = {"id", "prompt", "image", *_BUDGET_FIELDS}


class Question(NamedTuple):
    """One line of a file of questions.

    Attributes:
        id: Unique in the file.
        request: The question, with paths for images; None for an invalid line.
        budget: Limits and prices of its levels.
        error: Reason why the line is invalid; empty otherwise.
    """

    id: str
    request: Request | None
    budget: Budget
    error: str = ""


def read_questions(path: Path, image_root: Path, budget: Budget) -> list[Question]:
    """Reads a file of questions.

    A record is a JSON object with `prompt`, and optionally `id` (default: its position), `image` (a path or a list of
    paths), `granularity`, `token_cost` and `max_visual_tokens`. Invalid records become questions with an error.

    Args:
        path: JSON Lines, or a JSON list.
        image_root: Folder that image paths are relative to.
        budget: Budget of records that set none of its fields.

    Raises:
        DataError: The file cannot be read, or two records have the same id.
    """
    questions = [_parse(record, image_root, budget) for record in read_records(path)]
    for identity, count in Counter(question.id for question in questions).items():
        if count > 1:
            raise DataError(f"{path}: two records have the id {identity!r}; ids must be unique")
    return questions


def _parse(record: RawRecord, image_root: Path, budget: Budget) -> Question:
    value = record.value
    identity = value.get("id", record.position) if isinstance(value, dict) else record.position
    try:
        if record.error:
            raise DataError(record.error)
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"].strip():
            raise DataError("a record must be a JSON object with a non-empty 'prompt'")
        if unknown := value.keys() - _FIELDS:
            raise DataError(f"unknown fields {', '.join(sorted(unknown))}; known are {', '.join(sorted(_FIELDS))}")
        fields = {name: value[name] for name in _BUDGET_FIELDS if value.get(name) is not None}
        for name, number in fields.items():
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise DataError(f"{name} must be a number, got {number!r}")
        images = tuple(image_root / relative for relative in image_paths(value.get("image")))
        return Question(str(identity), Request(value["prompt"], images), Budget(**fields) if fields else budget)
    except ValueError as error:
        return Question(str(identity), None, budget, f"{record.source}: {error}")


def answer_file(
    predictor: Predictor, questions: Sequence[Question], output: Path, decoding: Decoding, batch_size: int
) -> int:
    """Appends an answer to `output` for each question that has none there yet.

    Each answer is appended as a whole line as soon as it is known, so that a killed run can be resumed. Failed
    questions are listed with the reason in a file beside `output` with the suffix `.errors.jsonl`.

    Returns:
        Number of failed questions.
    """
    answers = JsonLines(output)
    done = answers.read_by_id()
    todo = [question for question in questions if question.id not in done]
    output.parent.mkdir(parents=True, exist_ok=True)
    failures: list[dict[str, str]] = []
    answers.append([])  # creates the file even if no question can be answered
    with tqdm(total=len(questions), initial=len(questions) - len(todo), unit="question", disable=None) as bar:
        for start in range(0, len(todo), batch_size):
            for question, answer in _answer(predictor, todo[start : start + batch_size], decoding):
                if isinstance(answer, Answer):
                    answers.append([{"id": question.id, **asdict(answer)}])
                else:
                    failures.append({"id": question.id, "error": answer})
                bar.update()
    write_errors(output.with_suffix(".errors.jsonl"), failures)
    return len(failures)


def write_errors(path: Path, failures: Sequence[dict[str, str]]) -> None:
    """Writes failed questions as JSON Lines, or removes the file if there are none."""
    path.unlink(missing_ok=True)
    if failures:
        JsonLines(path).write(failures)


def _answer(
    predictor: Predictor, batch: Sequence[Question], decoding: Decoding
) -> Iterator[tuple[Question, Answer | str]]:
    """Yields each question with its answer or error; if the batch fails, its questions are answered one by one."""
    readable: list[tuple[Question, Request]] = []
    for question in batch:
        if question.request is None:
            yield question, question.error
            continue
        try:
            images = tuple(load_image(path) for path in question.request.images if isinstance(path, Path))
        except DataError as error:
            yield question, str(error)
            continue
        readable.append((question, Request(question.request.prompt, images)))
    if not readable:
        return
    try:
        budgets = [question.budget for question, _ in readable]
        answers = predictor.predict([request for _, request in readable], budgets, decoding)
    except ValueError as error:
        if len(batch) == 1:
            yield batch[0], str(error)
        else:
            for question, _ in readable:
                yield from _answer(predictor, [question], decoding)
        return
    for (question, _), answer in zip(readable, answers, strict=True):
        yield question, answer
