"""Answers the held-out questions of the mini world once per level, in several processes, and remembers the answers.

Every answer is appended to a JSON-lines file as soon as it is there: `llava-next.jsonl` (the stage-2 model at the
finest level), `fixed-<tokens per crop>.jsonl` (the final model) and `router.jsonl` (its log-probabilities). A second
call answers only what is missing. Answers of other weights or other questions are dropped.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from avg_llava.mini.claims import ClaimsError, Outcomes, Question, router_choice
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.templates import IMAGE_PLACEHOLDER

BATCH_SIZE = 32
MAX_NEW_TOKENS = 16
BASELINE, ROUTER = "llava-next", "router"
HELD_OUT, CALIBRATION = "eval.json", "router.json"
NUM_CALIBRATION = 2000


@dataclass(frozen=True)
class Item:
    """A held-out question with its image and prompt."""

    question: Question
    image: Path
    request: Request


@dataclass(frozen=True)
class Measurement:
    """What to measure.

    Attributes:
        baseline: Checkpoint of the stage-2 model; None where it is not compared with.
        final: Checkpoint of the stage-4 model.
        data: Folder of the mini world, with `eval.json` (the held-out questions) and `router.json`.
        answers: Folder that the answers are written to.
        num_workers: Processes that answer.
    """

    baseline: Path | None
    final: Path
    data: Path
    answers: Path
    num_workers: int


def read_questions(data: Path, name: str = HELD_OUT) -> list[Item]:
    """The single-turn questions of a file of the mini world.

    Raises:
        ClaimsError: If a record is not one question with one answer, or lacks its family.
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
        question = Question(sample.id, record["question_type"], record["family"], answered.strip())
        (image,) = sample.images
        items.append(Item(question, image, Request(asked.replace(IMAGE_PLACEHOLDER, "").strip(), (image,))))
    if len({item.question.id for item in items}) != len(items):
        raise ClaimsError(f"{path}: ids are not unique, so answers cannot be told apart")
    return items


# ---- the workers --------------------------------------------------------------------------------------------------

_predictors: dict[str, Predictor] = {}


def load_predictors(checkpoints: dict[str, Path], device: str) -> None:
    """Loads what `predictor_of` gives, in this process."""
    _predictors.clear()
    for name, path in checkpoints.items():
        _predictors[name] = make_predictor(path, device)


def predictor_of(name: str) -> Predictor:
    """A predictor that this process has loaded."""
    return _predictors[name]


def make_predictor(path: str | Path, device: str) -> Predictor:
    """A predictor of a checkpoint."""
    disable_progress_bar()  # of loading mini models, which takes no time
    return Pipeline.load(path, device=device).predictor


def _answer_batch(batch: tuple[str, list[Item]]) -> dict[str, list[dict[str, Any]]]:
    """Answers a batch with one of the two models: file name -> lines."""
    which, items = batch
    predictor = predictor_of(which)
    encoded = predictor.encode([item.request for item in items])
    finest = predictor.granularities[-1]
    if which == BASELINE:
        levels = {BASELINE: finest}
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
        assert choice.log_probs is not None, "the router was asked"
        log_probs = choice.log_probs.tolist()
        lines[ROUTER] = [{"id": item.question.id, "log_probs": row} for item, row in zip(items, log_probs, strict=True)]
    return lines


# ---- the store of answers -----------------------------------------------------------------------------------------


def _identity(measurement: Measurement) -> dict[str, str]:
    """What the answers depend on."""
    files = {
        **{name: folder / "model.safetensors" for name, folder in _checkpoints(measurement).items()},
        "questions": measurement.data / HELD_OUT,
        "calibration": measurement.data / CALIBRATION,
    }
    for name, path in files.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path} ({name}) is missing; run the stage that writes it first")
    return {name: hash_file(path) for name, path in files.items()}


def _store(answers: Path, name: str) -> JsonLines:
    return JsonLines(answers / f"{name}.jsonl")


def _checkpoints(measurement: Measurement) -> dict[str, Path]:
    """The models that answer."""
    folders = {BASELINE: measurement.baseline, "final": measurement.final}
    return {name: folder for name, folder in folders.items() if folder is not None}


def batch_by_length(items: Sequence[Item], config: AvgLlavaConfig) -> Iterator[list[Item]]:
    """Batches of images with about as many visual tokens, so that little is padded; longest first."""

    def length(item: Item) -> int:
        with Image.open(item.image) as image:
            return num_visual_tokens((image.height, image.width), (config.granularities or [0])[-1], config)

    ordered = sorted(items, key=length, reverse=True)
    for start in range(0, len(ordered), BATCH_SIZE):
        yield ordered[start : start + BATCH_SIZE]


def calibration_items(data: Path) -> list[Item]:
    """Questions by which the router's price is chosen: some of stage 4's, none of which is held out."""
    items = read_questions(data, CALIBRATION)
    return random.Random(0).sample(items, min(NUM_CALIBRATION, len(items)))


def collect_answers(
    measurement: Measurement, items: Sequence[Item], calibration: Sequence[Item] = ()
) -> tuple[int, ...]:
    """Answers whatever is not answered yet.

    Args:
        measurement: The models and where their answers are kept.
        items: The held-out questions, for both models.
        calibration: Further questions, for the final model alone.

    Returns:
        The levels of the final model in visual tokens per crop, coarse to fine.
    """
    open_folder(measurement.answers, _identity(measurement))
    config = AvgLlavaConfig.from_pretrained(measurement.final)
    granularities = tuple(config.granularities or ())
    checkpoints = _checkpoints(measurement)
    names = {BASELINE: [BASELINE], "final": [*(f"fixed-{level}" for level in granularities), ROUTER]}
    asked = {BASELINE: items, "final": [*items, *calibration]}
    todo: dict[str, list[Item]] = {which: [] for which in names}
    for which in checkpoints:
        answered = [_store(measurement.answers, name).read_by_id() for name in names[which]]
        todo[which] = [item for item in asked[which] if not all(item.question.id in lines for lines in answered)]
    total = sum(map(len, todo.values()))
    if not total:
        return granularities

    # The final model answers at every level, so its batches take longest and go first.
    batches = [(which, batch) for which in ("final", BASELINE) for batch in batch_by_length(todo[which], config)]
    start = partial(load_predictors, checkpoints)
    with tqdm(total=total, desc="answering", unit="question", dynamic_ncols=True) as progress:
        for answered_batch in map_batches(start, _answer_batch, batches, measurement.num_workers):
            for name, lines in answered_batch.items():
                _store(measurement.answers, name).append(lines)
            progress.update(len(next(iter(answered_batch.values()))))
    return granularities


def read_outcomes(
    answers: Path, questions: Sequence[Question], granularities: Sequence[int], with_baseline: bool = True
) -> Outcomes:
    """The collected answers as arrays.

    Args:
        answers: The folder of the answers.
        questions: The questions, in the order of the arrays.
        granularities: The levels, coarse to fine.
        with_baseline: Whether LLaVA-NeXT was asked too.

    Raises:
        ClaimsError: If an answer is missing.
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
    measurement: Measurement, items: Sequence[Item], outcomes: Outcomes, token_cost: float, num_verified: int = 64
) -> int:
    """Answers a sample of the questions with the router choosing, and compares with what was looked up.

    Returns:
        The number of questions compared.

    Raises:
        ClaimsError: If a routed answer or its level differs from the forced one.
    """
    chosen = router_choice(outcomes.router_log_probs, outcomes.granularities, token_cost)
    sample = sorted(random.Random(0).sample(range(len(items)), min(num_verified, len(items))))
    predictor = make_predictor(measurement.final, "cuda" if torch.cuda.is_available() else "cpu")
    forced = {level: _store(measurement.answers, f"fixed-{level}").read_by_id() for level in outcomes.granularities}
    for start in range(0, len(sample), BATCH_SIZE):
        batch = sample[start : start + BATCH_SIZE]
        routed = predictor.predict(
            [items[index].request for index in batch], Budget(token_cost=token_cost), Decoding(MAX_NEW_TOKENS)
        )
        for index, prediction in zip(batch, routed, strict=True):
            level = outcomes.granularities[chosen[index]]
            looked_up = forced[level][items[index].question.id]["prediction"]
            if prediction.granularity != (level,) or prediction.text != looked_up:
                raise ClaimsError(
                    f"question {items[index].question.id}: routed generation gives {prediction.text!r} at "
                    f"{prediction.granularity[0]} tokens per crop, the forced level {level} gave {looked_up!r}"
                )
    return len(sample)
