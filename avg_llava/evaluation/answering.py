"""Answers a benchmark's questions, in several processes, and remembers them.

A question is answered under one or more keys: "auto" (the router chose), "random", or a level in visual tokens a crop.
Batches are made once, of all questions, so that a killed run that goes on makes the same answers.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from avg_llava.common.jsonl import JsonLines, open_folder
from avg_llava.common.workers import default_workers, map_batches
from avg_llava.evaluation.benchmarks import BENCHMARKS, HarnessTask, Protocol
from avg_llava.evaluation.questions import LocalQuestions, Questions
from avg_llava.evaluation.results import Failure, Granularity
from avg_llava.inference.answers import Answer, Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.pipeline import Pipeline
from avg_llava.inference.predictor import EncodedRequests, LevelChoice, Predictor
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.images import DataError
from avg_llava.model.modeling import PromptTooLongError

AUTO, RANDOM, ALL = "auto", "random", "all"
BATCHES_PER_WORKER = 64
"""Fewer are sooner answered than another process has started."""


@dataclass(frozen=True)
class Setting:
    """Who answers what, and how.

    Attributes:
        benchmark: One of `BENCHMARKS`.
        model: The checkpoint.
        protocol: Whose prompts and metrics.
        granularity: A level in visual tokens per crop, "auto" (the router), "random", or "all": the router, and every
            level besides.
        token_cost: The router's price in nats per doubling of visual tokens.
        data: Folder with copies of the data sets; None takes the hub's.
        limit: Only so many questions from the start; None takes all.
        batch_size: Questions at a time; 1, as in the paper, times each by itself.
        dtype: Data type of the weights.
    """

    benchmark: str
    model: Path
    protocol: Protocol
    granularity: Granularity
    token_cost: float
    data: Path | None
    limit: int | None
    batch_size: int
    dtype: torch.dtype


def open_questions(setting: Setting) -> Questions:
    """Opens the questions of the setting's benchmark.

    Raises:
        BenchmarkError: The data set cannot be opened.
    """
    if isinstance(BENCHMARKS[setting.benchmark].source, HarnessTask):
        from avg_llava.evaluation.tasks import HarnessQuestions  # lmms-eval, which other benchmarks do without

        return HarnessQuestions(setting.benchmark, setting.protocol, setting.data)
    return LocalQuestions(setting.benchmark, setting.protocol, setting.data)


# ---- in a worker --------------------------------------------------------------------------------------------------

_worker: "tuple[Setting, Questions, Predictor] | None" = None


def _start_worker(setting: Setting, device: str) -> None:
    global _worker
    _worker = (setting, open_questions(setting), load_predictor(setting, device))


def load_predictor(setting: Setting, device: str) -> Predictor:
    """The setting's model."""
    return Pipeline.load(setting.model, dtype=setting.dtype, device=device).predictor


def _answer_batch(indices: Sequence[int]) -> list[dict[str, Any] | Failure]:
    """A line of the store for each question, or why there is none."""
    assert _worker is not None, "the worker was not started"
    setting, questions, predictor = _worker
    requests: dict[int, Request] = {}
    lines: list[dict[str, Any] | Failure] = []
    for index in indices:
        try:
            requests[index] = questions.request(index)
        except DataError as error:
            lines.append(Failure(str(index), str(error)))
    # One with images and one without differ in what there is to choose: apart from each other.
    for group in (
        [index for index in requests if requests[index].images],
        [index for index in requests if not requests[index].images],
    ):
        lines += _answer_group(group, requests, setting, questions, predictor)
    return lines


def _answer_group(
    indices: list[int],
    requests: Mapping[int, Request],
    setting: Setting,
    questions: Questions,
    predictor: Predictor,
) -> Iterator[dict[str, Any] | Failure]:
    if not indices:
        return
    try:
        encoded = predictor.encode([requests[index] for index in indices])
        answers, log_probs = _answer_keys(encoded, indices, setting, questions, predictor)
    except PromptTooLongError as error:
        if len(indices) == 1:
            yield Failure(str(indices[0]), f"{questions.label(indices[0])}: {error}")
            return
        for index in indices:
            yield from _answer_group([index], requests, setting, questions, predictor)
        return
    sizes = encoded.features.image_sizes if encoded.features else []
    tokens = [num_visual_tokens(size, predictor.granularities[-1], predictor.model.config) for size in sizes]
    finest = [sum(own) for own in _by_request(tokens, encoded)]
    for row, index in enumerate(indices):
        yield {
            "id": str(index),
            "answers": {key: _to_json(predictions[row], len(indices)) for key, predictions in answers.items()},
            "router_log_probs": log_probs[row] if log_probs else None,
            "finest_visual_tokens": finest[row],
        }


def _answer_keys(
    encoded: EncodedRequests,
    indices: list[int],
    setting: Setting,
    questions: Questions,
    predictor: Predictor,
) -> tuple[dict[str, list[Answer]], list[Any] | None]:
    """Key -> predictions, and each question's router log-probabilities, image by image."""

    def answer(granularity: int | Sequence[int] | LevelChoice | None) -> list[Answer]:
        return predictor.answer(encoded, granularity, Decoding(questions.max_new_tokens, stop=questions.stop))

    if encoded.features is None:
        return {AUTO: answer(None)}, None
    if isinstance(setting.granularity, int):
        return {str(setting.granularity): answer(setting.granularity)}, None
    if setting.granularity == RANDOM:
        levels = [
            random.Random(f"{index}/{image}").choice(predictor.granularities)
            for index, count in zip(indices, encoded.images_per_request, strict=True)
            for image in range(count)
        ]
        return {RANDOM: answer(levels)}, None
    choice = predictor.choose(encoded, Budget(token_cost=setting.token_cost))
    assert choice.log_probs is not None, "the router was asked"
    answers = {AUTO: answer(choice)}
    if setting.granularity == ALL:
        answers |= {str(level): answer(level) for level in predictor.granularities}
    return answers, _by_request(choice.log_probs.tolist(), encoded)


def _by_request(rows: list[Any], encoded: EncodedRequests) -> list[Any]:
    remaining = iter(rows)
    return [[next(remaining) for _ in range(count)] for count in encoded.images_per_request]


def _to_json(prediction: Answer, num_questions: int) -> dict[str, Any]:
    """A prediction as the store keeps it; of a batch's time, the question's share."""
    return {
        "prediction": prediction.text,
        "granularity": list(prediction.granularity),
        "num_visual_tokens": prediction.num_visual_tokens,
        "milliseconds": {name: value / num_questions for name, value in asdict(prediction.timings).items()},
    }


# ---- all questions ------------------------------------------------------------------------------------------------


def collect_answers(
    setting: Setting, questions: Questions, folder: Path, identity: Mapping[str, Any], num_workers: int | None
) -> tuple[dict[int, dict[str, Any]], list[Failure]]:
    """Answers whatever is not answered yet.

    Args:
        setting: Who answers what.
        questions: The setting's questions.
        folder: Where answers are kept.
        identity: What the answers depend on.
        num_workers: Processes that answer; None takes one per GPU or core where there is enough to do.

    Returns:
        The store's lines by question number, in order; and the questions that failed.
    """
    open_folder(folder, identity)
    store = JsonLines(folder / "answers.jsonl")
    numbers = range(min(len(questions), setting.limit or len(questions)))
    batches = [numbers[start : start + setting.batch_size] for start in range(0, len(numbers), setting.batch_size)]
    known = set(store.read_by_id())
    todo = [list(batch) for batch in batches if any(str(index) not in known for index in batch)]
    failures: list[Failure] = []
    start: Callable[[str], None] = partial(_start_worker, setting)
    with tqdm(
        total=len(numbers),
        initial=len(numbers) - sum(map(len, todo)),
        desc=setting.benchmark,
        unit="question",
        dynamic_ncols=True,
    ) as progress:
        for lines in map_batches(start, _answer_batch, todo, _num_workers(num_workers, len(todo))) if todo else ():
            failures += [line for line in lines if isinstance(line, Failure)]
            store.append(line for line in lines if not isinstance(line, Failure) and line["id"] not in known)
            progress.update(len(lines))
    found = {int(key): line for key, line in store.read_by_id().items() if int(key) in numbers}
    return dict(sorted(found.items())), sorted(failures, key=lambda failure: int(failure.id))


def _num_workers(wanted: int | None, num_batches: int) -> int:
    if wanted is None:
        wanted = min(default_workers(), math.ceil(num_batches / BATCHES_PER_WORKER))
    return max(1, min(wanted, num_batches))


__all__ = ["ALL", "AUTO", "RANDOM", "Setting", "collect_answers", "load_predictor"]
