"""Answers of the mini models to the mini world's questions at every level, collected by several processes.

Answers are appended to JSON-lines files as they are generated: `llava-next.jsonl` (the stage-2 model at the finest
level), `fixed-<tokens per crop>.jsonl` (the final model) and `router.jsonl` (its log-probabilities). A second call
generates only missing answers. Answers of other weights or other questions are deleted.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from avg_llava.common.files import hash_file
from avg_llava.common.jsonl import JsonLines, open_folder
from avg_llava.common.workers import map_batches
from avg_llava.data.records import parse_record
from avg_llava.inference.answers import Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.pipeline import Pipeline
from avg_llava.inference.predictor import Predictor
from avg_llava.mini.claims import ClaimsError, EvalQuestion, Outcomes, choose_levels
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.templates import IMAGE_PLACEHOLDER

BATCH_SIZE = 32
MAX_NEW_TOKENS = 16
BASELINE, ROUTER = "llava-next", "router"
HELD_OUT, CALIBRATION = "eval.json", "router.json"
NUM_CALIBRATION = 2000

Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Item:
    """A question with its image file and its request to a model."""

    question: EvalQuestion
    image: Path
    request: Request


@dataclass(frozen=True)
class AnsweringJob:
    """Models, questions and the folder of answers.

    Attributes:
        baseline: Checkpoint of the stage-2 model; None if only the final model answers.
        final: Checkpoint of the stage-4 model.
        data: Folder of the mini world.
        answers: Folder of the JSON-lines files.
    """

    baseline: Path | None
    final: Path
    data: Path
    answers: Path
    num_workers: int

    @property
    def checkpoints(self) -> dict[str, Path]:
        """Checkpoints by name of the model; the final model, whose batches take longest, is first."""
        return {"final": self.final} | ({} if self.baseline is None else {BASELINE: self.baseline})


def read_questions(data: Path, name: str = HELD_OUT) -> list[Item]:
    """Reads the single-turn questions of a file of the mini world.

    Raises:
        FileNotFoundError: The file is missing.
        ClaimsError: A record is not one question with one answer, or lacks its family.
    """
    path = data / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; make it with `avg-llava mini data --output {data}`")
    items = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        sample = parse_record(record, data, str(path))
        missing = [key for key in ("family", "question_type") if not isinstance(record.get(key), str)]
        if missing or len(sample.turns) != 2 or len(sample.images) != 1:
            raise ClaimsError(
                f"{path}: record {sample.id} must have one image, one question, one answer, and the texts family and "
                f"question_type{' (missing: ' + ', '.join(missing) + ')' if missing else ''}"
            )
        asked, answered = (turn.value for turn in sample.turns)
        question = EvalQuestion(sample.id, record["question_type"], record["family"], answered.strip())
        (image,) = sample.images
        items.append(Item(question, image, Request(asked.replace(IMAGE_PLACEHOLDER, "").strip(), (image,))))
    if len({item.question.id for item in items}) != len(items):
        raise ClaimsError(f"{path}: ids are not unique, so answers cannot be told apart")
    return items


# ---- the workers --------------------------------------------------------------------------------------------------

Predictors = Mapping[str, Predictor]
"""The checkpoints that a process has loaded, by name."""


def start_worker(
    process: Callable[[Predictors, Batch], Result], checkpoints: Mapping[str, Path], device: str
) -> Callable[[Batch], Result]:
    """Loads checkpoints and returns `process` with their predictors."""
    return partial(process, {name: make_predictor(path, device) for name, path in checkpoints.items()})


def make_predictor(path: str | Path, device: str) -> Predictor:
    """Loads a checkpoint."""
    disable_progress_bar()  # mini models load at once
    return Pipeline.load(path, device=device).predictor


def _answer_batch(predictors: Predictors, batch: tuple[str, list[Item]]) -> dict[str, list[dict[str, Any]]]:
    """Runs in a worker: the lines of a batch by file name, from one of the two models."""
    which, items = batch
    predictor = predictors[which]
    encoded = predictor.encode([item.request for item in items])
    if which == BASELINE:
        levels = {BASELINE: predictor.granularities[-1]}
    else:
        levels = {f"fixed-{granularity}": granularity for granularity in predictor.granularities}
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, granularity in levels.items():
        predictions = predictor.answer(encoded, granularity, Decoding(MAX_NEW_TOKENS))
        lines[name] = [
            {
                "id": item.question.id,
                "prediction": prediction.text,
                "correct": prediction.text == item.question.answer,
                "num_visual_tokens": prediction.num_visual_tokens,
            }
            for item, prediction in zip(items, predictions, strict=True)
        ]
    if which != BASELINE:
        choice = predictor.choose(encoded)
        assert choice.log_probs is not None, "the router ran"
        log_probs = choice.log_probs.tolist()
        lines[ROUTER] = [{"id": item.question.id, "log_probs": row} for item, row in zip(items, log_probs, strict=True)]
    return lines


# ---- the folder of answers -----------------------------------------------------------------------------------------


def _store(answers: Path, name: str) -> JsonLines:
    return JsonLines(answers / f"{name}.jsonl")


def batch_by_length(items: Sequence[Item], config: AvgLlavaConfig) -> Iterator[list[Item]]:
    """Batches of images with similar numbers of visual tokens, to save padding; longest first."""

    def length(item: Item) -> int:
        with Image.open(item.image) as image:
            return num_visual_tokens((image.height, image.width), (config.granularities or [0])[-1], config)

    ordered = sorted(items, key=length, reverse=True)
    for start in range(0, len(ordered), BATCH_SIZE):
        yield ordered[start : start + BATCH_SIZE]


def calibration_items(data: Path) -> list[Item]:
    """Questions for choosing the router's price: a sample of stage 4's training data, none of them held out."""
    items = read_questions(data, CALIBRATION)
    return random.Random(0).sample(items, min(NUM_CALIBRATION, len(items)))


def collect_answers(job: AnsweringJob, items: Sequence[Item], calibration: Sequence[Item] = ()) -> tuple[int, ...]:
    """Generates all missing answers.

    Args:
        job: The models and the folder of their answers.
        items: Held-out questions, for both models.
        calibration: Further questions, for the final model only.

    Returns:
        The levels of the final model in visual tokens per crop, coarse to fine.

    Raises:
        FileNotFoundError: A file that the answers depend on is missing.
    """
    files = {
        **{name: folder / "model.safetensors" for name, folder in job.checkpoints.items()},
        "questions": job.data / HELD_OUT,
        "calibration": job.data / CALIBRATION,
    }
    for name, path in files.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path} ({name}) is missing; run the stage that writes it first")
    open_folder(job.answers, {name: hash_file(path) for name, path in files.items()})
    config = AvgLlavaConfig.from_pretrained(job.final)
    granularities = tuple(config.granularities or ())
    names = {BASELINE: [BASELINE], "final": [*(f"fixed-{level}" for level in granularities), ROUTER]}
    asked = {BASELINE: items, "final": [*items, *calibration]}
    batches: list[tuple[str, list[Item]]] = []
    for which in job.checkpoints:
        answered = set.intersection(*(set(_store(job.answers, name).read_by_id()) for name in names[which]))
        missing = [item for item in asked[which] if item.question.id not in answered]
        batches += [(which, batch) for batch in batch_by_length(missing, config)]
    if not batches:
        return granularities

    start = partial(start_worker, _answer_batch, job.checkpoints)
    total = sum(len(batch) for _, batch in batches)
    with tqdm(total=total, desc="answering", unit="question", dynamic_ncols=True) as progress:
        for answered_batch in map_batches(start, batches, job.num_workers):
            for name, lines in answered_batch.items():
                _store(job.answers, name).append(lines)
            progress.update(len(next(iter(answered_batch.values()))))
    return granularities


def read_outcomes(
    answers: Path, questions: Sequence[EvalQuestion], granularities: Sequence[int], with_baseline: bool = True
) -> Outcomes:
    """Reads the collected answers as arrays, in the order of the questions.

    Raises:
        ClaimsError: An answer is missing.
    """

    def column(name: str, key: str) -> list[Any]:
        lines = _store(answers, name).read_by_id()
        missing = [question.id for question in questions if question.id not in lines]
        if missing:
            raise ClaimsError(f"{answers / name}.jsonl lacks {len(missing)} answers, the first to {missing[0]}")
        return [lines[question.id][key] for question in questions]

    def per_level(key: str) -> np.ndarray:
        return np.array([column(f"fixed-{granularity}", key) for granularity in granularities]).T

    return Outcomes(
        questions=list(questions),
        granularities=tuple(granularities),
        correct=per_level("correct"),
        tokens=per_level("num_visual_tokens").astype(np.float64),
        router_log_probs=np.array(column(ROUTER, "log_probs"), dtype=np.float64),
        baseline_correct=np.array(column(BASELINE, "correct")) if with_baseline else None,
        baseline_tokens=np.array(column(BASELINE, "num_visual_tokens"), dtype=np.float64) if with_baseline else None,
    )


def verify_routing(
    job: AnsweringJob, items: Sequence[Item], outcomes: Outcomes, token_cost: float, num_verified: int = 64
) -> int:
    """Checks on a sample of the questions that routed generation gives the level and answer found by lookup.

    Returns:
        The number of questions checked.

    Raises:
        ClaimsError: A routed answer or its level differs from the recorded one.
    """
    chosen = choose_levels(outcomes.router_log_probs, outcomes.granularities, token_cost)
    sample = sorted(random.Random(0).sample(range(len(items)), min(num_verified, len(items))))
    predictor = make_predictor(job.final, "cuda" if torch.cuda.is_available() else "cpu")
    forced = {level: _store(job.answers, f"fixed-{level}").read_by_id() for level in outcomes.granularities}
    for start in range(0, len(sample), BATCH_SIZE):
        batch = sample[start : start + BATCH_SIZE]
        routed = predictor.predict(
            [items[index].request for index in batch], Budget(token_cost=token_cost), Decoding(MAX_NEW_TOKENS)
        )
        for index, prediction in zip(batch, routed, strict=True):
            level = outcomes.granularities[chosen[index]]
            recorded = forced[level][items[index].question.id]["prediction"]
            if prediction.granularity != (level,) or prediction.text != recorded:
                raise ClaimsError(
                    f"question {items[index].question.id}: routed generation gives {prediction.text!r} at "
                    f"{prediction.granularity[0]} tokens per crop, the forced level {level} gave {recorded!r}"
                )
    return len(sample)
