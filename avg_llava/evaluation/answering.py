"""Answers a benchmark's questions in one or several processes, and keeps the answers so that a killed run continues.

A question is answered under one or more keys: "auto" (routed), "random", or a level in visual tokens per crop. Batches
are cut from all questions before any is skipped, so that a continued run answers the same batches.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
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
from avg_llava.model.chat_templates import RefusedPromptError
from avg_llava.model.images import DataError
from avg_llava.model.modeling import PromptTooLongError

AUTO, RANDOM, ALL = "auto", "random", "all"
BATCHES_PER_WORKER = 64
"""With fewer batches per process, starting another process takes longer than answering them."""

Line = dict[str, Any]
"""A question's answers as they are stored: `id`, `answers` by key, the scored one first, `router_log_probs`,
`finest_visual_tokens`."""


@dataclass(frozen=True)
class Setting:
    """A benchmark, a model, and the way in which it answers.

    Attributes:
        benchmark: One of `BENCHMARKS`.
        granularity: A level in visual tokens per crop, "auto" (the router), "random", or "all" (the router, and every
            level in addition).
        token_cost: The router's price in nats per doubling of visual tokens.
        data: Folder with local copies of the data sets; None uses the hub's.
        limit: Number of questions to answer, from the first; None answers all.
        batch_size: Questions per batch. Times are per question only with 1, as in the paper.
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
    """Opens the questions of the setting's benchmark."""
    if isinstance(BENCHMARKS[setting.benchmark].source, HarnessTask):
        from avg_llava.evaluation.tasks import HarnessQuestions  # needs lmms-eval, unlike local benchmarks

        return HarnessQuestions(setting.benchmark, setting.protocol, setting.data)
    return LocalQuestions(setting.benchmark, setting.protocol, setting.data)


class ModelLoader:
    """Loads a checkpoint on first use, once for all benchmarks that this process answers and times."""

    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self._predictor: Predictor | None = None

    def load(self, device: str) -> Predictor:
        """Returns the predictor, on the device of the first call."""
        if self._predictor is None:
            self._predictor = Pipeline.load(self.model, dtype=self.dtype, device=device).predictor
        return self._predictor

    def release(self) -> None:
        """Frees the model; the next use loads it again."""
        self._predictor = None


def collect_answers(
    setting: Setting,
    questions: Questions,
    folder: Path,
    identity: Mapping[str, Any],
    num_workers: int | None,
    loader: ModelLoader,
) -> tuple[dict[int, Line], list[Failure]]:
    """Answers the questions that have no stored answer yet.

    Args:
        folder: Folder of the stored answers.
        identity: Everything that the answers depend on; answers of another identity are discarded.
        num_workers: Number of processes; None starts one per GPU or core if there is enough to do.
        loader: Gives the model if this process answers; other processes load it themselves.

    Returns:
        Question index -> stored line, in order; and the questions without an answer.
    """
    open_folder(folder, identity)
    store = JsonLines(folder / "answers.jsonl")
    indices = range(min(len(questions), setting.limit or len(questions)))
    batches = [indices[start : start + setting.batch_size] for start in range(0, len(indices), setting.batch_size)]
    known = set(store.read_by_id())
    missing = [list(batch) for batch in batches if any(str(index) not in known for index in batch)]
    failures: list[Failure] = []
    if num_workers is None:
        num_workers = min(default_workers(), math.ceil(len(missing) / BATCHES_PER_WORKER))
    num_workers = max(1, min(num_workers, len(missing)))
    if num_workers > 1:
        loader.release()  # the workers load the model, and may need this process's share of a GPU
    with tqdm(
        total=len(indices),
        initial=len(indices) - sum(map(len, missing)),
        desc=setting.benchmark,
        unit="question",
        dynamic_ncols=True,
    ) as progress:
        start = partial(_Answerer, setting, loader)
        for lines in map_batches(start, missing, num_workers) if missing else ():
            failures += [line for line in lines if isinstance(line, Failure)]
            store.append(line for line in lines if not isinstance(line, Failure) and line["id"] not in known)
            progress.update(len(lines))
    found = {int(key): line for key, line in store.read_by_id().items() if int(key) in indices}
    return dict(sorted(found.items())), sorted(failures, key=lambda failure: int(failure.id))


class _Answerer:
    """Answers batches of questions in one process."""

    def __init__(self, setting: Setting, loader: ModelLoader, device: str) -> None:
        self.setting = setting
        self.questions = open_questions(setting)
        self.predictor = loader.load(device)

    def __call__(self, indices: Sequence[int]) -> list[Line | Failure]:
        """A line or a failure per question; in the order of the batch only if all have images or none has."""
        requests: dict[int, Request] = {}
        lines: list[Line | Failure] = []
        for index in indices:
            try:
                requests[index] = self.questions.request(index)
            except DataError as error:
                lines.append(Failure(str(index), str(error)))
        for has_images in (True, False):  # without images there is no level to choose, so they are no batch together
            lines += self._answer({index: each for index, each in requests.items() if bool(each.images) == has_images})
        return lines

    def _answer(self, requests: Mapping[int, Request]) -> Iterator[Line | Failure]:
        if not requests:
            return
        try:
            encoded = self.predictor.encode(list(requests.values()))
            answers, log_probs = self._answer_keys(encoded, list(requests))
        except (PromptTooLongError, RefusedPromptError) as error:
            if len(requests) == 1:
                (index,) = requests
                yield Failure(str(index), f"{self.questions.label(index)}: {error}")
                return
            for index, request in requests.items():
                yield from self._answer({index: request})
            return
        sizes = encoded.features.image_sizes if encoded.features else []
        finest = self.predictor.granularities[-1]
        tokens = [num_visual_tokens(size, finest, self.predictor.model.config) for size in sizes]
        for row, (index, images) in enumerate(zip(requests, encoded.image_slices(), strict=True)):
            yield {
                "id": str(index),
                "answers": {key: _to_json(of_key[row], len(requests)) for key, of_key in answers.items()},
                "router_log_probs": log_probs[images] if log_probs else None,
                "finest_visual_tokens": sum(tokens[images]),
            }

    def _answer_keys(
        self, encoded: EncodedRequests, indices: Sequence[int]
    ) -> tuple[dict[str, list[Answer]], list[Any] | None]:
        """Answers a batch under every key of the setting.

        Returns:
            Key -> one answer per question, the key that is scored first; and the router's log-probabilities of each
            image (N, G), None if it did not run.
        """
        decoding = Decoding(self.questions.max_new_tokens, stop=self.questions.stop)
        requested, levels = self.setting.granularity, self.predictor.granularities

        def answer(granularity: int | Sequence[int] | LevelChoice | None) -> list[Answer]:
            return self.predictor.answer(encoded, granularity, decoding)

        if encoded.features is None:
            return {AUTO: answer(None)}, None
        if isinstance(requested, int):
            return {str(requested): answer(requested)}, None
        if requested == RANDOM:
            sampled = [
                random.Random(f"{index}/{image}").choice(levels)
                for index, count in zip(indices, encoded.images_per_request, strict=True)
                for image in range(count)
            ]
            return {RANDOM: answer(sampled)}, None
        choice = self.predictor.choose(encoded, Budget(token_cost=self.setting.token_cost))
        assert choice.log_probs is not None, "the router ran"
        answers = {AUTO: answer(choice)}
        if requested == ALL:
            answers |= {str(level): answer(level) for level in levels}
        return answers, choice.log_probs.tolist()


def _to_json(answer: Answer, batch_size: int) -> dict[str, Any]:
    """An answer as it is stored; times are the batch's, divided by its questions."""
    return {
        "prediction": answer.text,
        "granularity": list(answer.granularity),
        "num_visual_tokens": answer.num_visual_tokens,
        "milliseconds": {phase: time / batch_size for phase, time in asdict(answer.timings).items()},
    }
