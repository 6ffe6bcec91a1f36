"""`avg-llava evaluate`: evaluates one benchmark in one setting and writes one result file.

Apart from times and machine, the result is a function of model, questions and setting: it depends neither on the number
of processes nor on interruptions.
"""

import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from avg_llava.checkpoints.formats import open_checkpoint
from avg_llava.checkpoints.loading import load_model_config
from avg_llava.common.files import hash_file, hash_json
from avg_llava.common.jsonl import JsonLines
from avg_llava.common.machine import machine_facts
from avg_llava.evaluation.answering import (
    ALL,
    RANDOM,
    Line,
    ModelLoader,
    Setting,
    collect_answers,
    open_questions,
)
from avg_llava.evaluation.benchmarks.benchmark import Outcome, Outcomes
from avg_llava.evaluation.llava_next import llava_next_answerer
from avg_llava.evaluation.questions import Questions
from avg_llava.evaluation.results import (
    FORMAT,
    CurvePoint,
    Efficiency,
    GenerationFacts,
    ModelFacts,
    Oracle,
    Result,
    Routing,
    Speed,
    Spread,
    write_result,
)
from avg_llava.evaluation.statistics import Metric
from avg_llava.inference.answers import Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.predictor import Predictor
from avg_llava.model.images import DataError
from avg_llava.model.router import level_values

TOKEN_COSTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
"""Prices of the curve, in nats per doubling of visual tokens."""

SEED = 0
"""The seed of lmms-eval while it scores; MMMU guesses a letter for answers without one."""

StoredAnswer = Mapping[str, Any]
"""One answer of a `Line`."""


def evaluate(
    setting: Setting, output: Path, num_workers: int | None, num_timed: int, loader: ModelLoader | None = None
) -> Result:
    """Answers, scores and times one benchmark; writes `<output>/<benchmark>.json` and the answers beside it.

    Answers are kept in `<output>/store/<benchmark>`; a second call computes the missing ones only.

    Args:
        num_workers: Number of processes; None starts one per GPU or core if there is enough to do.
        num_timed: Number of questions on which the model is timed against its finest level and against transformers'
            LLaVA-NeXT; 0 skips this.
        loader: The setting's model, to share it with other evaluations in this process.

    Raises:
        ValueError: The model lacks the requested level, or no question could be answered.
    """
    loader = loader or ModelLoader(setting.model, setting.dtype)
    levels = list(load_model_config(setting.model).granularities)
    if isinstance(setting.granularity, int) and setting.granularity not in levels:
        raise ValueError(f"granularity {setting.granularity} is none of the model's levels {levels}")
    questions = open_questions(setting)
    dtype = str(setting.dtype).removeprefix("torch.")
    model = ModelFacts(str(setting.model), fingerprint_model(setting.model), dtype, tuple(levels))
    identity = _identity(setting, questions, model)
    store = output / "store" / setting.benchmark
    lines, failures = collect_answers(setting, questions, store, identity, num_workers, loader)

    chosen = {index: next(iter(line["answers"].values())) for index, line in lines.items()}
    outcomes = score_answers(questions, {index: answer["prediction"] for index, answer in chosen.items()})
    metrics = compute_metrics(questions, outcomes)
    answers = output / f"{setting.benchmark}.answers.jsonl"
    JsonLines(answers).write(
        {
            "id": str(index),
            "prompt": questions.prompt(index),
            "reference": questions.reference(index),
            **answer,
            "router_log_probs": lines[index]["router_log_probs"],
            "score": questions.benchmark.question_score(outcomes[index]),
        }
        for index, answer in chosen.items()
    )
    speed = None
    if num_timed:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        speed = measure_speed(loader.load(device), questions, list(lines)[:num_timed], setting)
    oracle, curve = None, None
    if setting.granularity == ALL:
        oracle, curve = _compare_levels(lines, chosen, outcomes, levels, questions)
    result = Result(
        format=FORMAT,
        benchmark=setting.benchmark,
        protocol=setting.protocol,
        model=model,
        granularity=setting.granularity,
        token_cost=setting.token_cost,
        dataset=questions.dataset,
        harness=questions.harness,
        generation=GenerationFacts(questions.max_new_tokens, setting.batch_size),
        prompt=questions.prompt(0),
        complete=len(lines) == len(questions),
        num_failed=len(failures),
        failures=tuple(failures),
        metrics=metrics,
        efficiency=_efficiency(lines, chosen, levels, speed),
        routing=Routing(_level_shares(chosen, levels), oracle, curve),
        machine=machine_facts(),
        answers=answers.name,
    )
    write_result(result, output / f"{setting.benchmark}.json")
    return result


def fingerprint_model(path: str | Path) -> str:
    """SHA-256 over the names and hashes of a checkpoint's weights and its configuration; a folder or hub id."""
    return hash_json([(file.name, hash_file(file)) for file in sorted(open_checkpoint(path).files())])


def _identity(setting: Setting, questions: Questions, model: ModelFacts) -> dict[str, Any]:
    """Everything that the stored answers depend on."""
    return {
        "model": model.fingerprint,
        "dtype": model.dtype,
        "questions": questions.dataset.fingerprint,
        "prompt": questions.prompt(0),
        "protocol": setting.protocol,
        "harness": questions.harness.version,
        "granularity": setting.granularity,
        "token_cost": setting.token_cost,
        "batch_size": setting.batch_size,
    }


# ---- scores -------------------------------------------------------------------------------------------------------


def score_answers(questions: Questions, answers: Mapping[int, str]) -> dict[int, Outcome]:
    """Scores each answer, in the order of the questions: question index -> outcome."""
    state = random.getstate()
    random.seed(SEED)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # lmms-eval prints while it scores
            return {index: questions.outcome(index, answers[index]) for index in sorted(answers)}
    finally:
        random.setstate(state)


def compute_metrics(questions: Questions, outcomes: Outcomes) -> dict[str, Metric]:
    """Computes the metrics of scored answers, the headline first.

    Raises:
        ValueError: There is no outcome.
    """
    if not outcomes:
        raise ValueError(f"{questions.name}: no question was answered, so there is no score")
    with contextlib.redirect_stdout(sys.stderr):
        metrics = questions.benchmark.metrics(outcomes, questions.protocol)
    return {name: metric for name, metric in metrics.items() if metric}


# ---- tokens and times ---------------------------------------------------------------------------------------------


def _efficiency(
    lines: Mapping[int, Line], chosen: Mapping[int, StoredAnswer], levels: Sequence[int], speed: Speed | None
) -> Efficiency:
    times = [answer["milliseconds"] for answer in chosen.values()]
    first = [phases["encode"] + phases["route"] + phases["prefill"] for phases in times]
    totals = [sum(phases.values()) for phases in times]
    routing = sum(phases["route"] for phases in times)
    with_images = [index for index, line in lines.items() if line["finest_visual_tokens"]]
    token_shares = [chosen[index]["num_visual_tokens"] / lines[index]["finest_visual_tokens"] for index in with_images]
    grid_shares = [fmean(chosen[index]["granularity"]) / levels[-1] for index in with_images]
    return Efficiency(
        mean_visual_tokens=fmean(answer["num_visual_tokens"] for answer in chosen.values()),
        token_share=fmean(token_shares or [1.0]),
        grid_share=fmean(grid_shares or [1.0]),
        time_to_first_token_ms=Spread(median(first), fmean(first)),
        seconds_per_question=Spread(median(totals) / 1000, fmean(totals) / 1000),
        router_share=routing / sum(totals) if routing else None,
        speed=speed,
    )


def measure_speed(predictor: Predictor, questions: Questions, indices: Sequence[int], setting: Setting) -> Speed | None:
    """Times the setting, the finest level and transformers' LLaVA-NeXT on the same questions; returns the medians.

    Questions are answered one at a time by each of the three in turn, after a warm-up on the first. A time runs from
    the image's pixels to the last token. Answers end at the closing token or at the benchmark's maximum length. The
    result is None if no question has an image or levels are sampled.
    """
    if setting.granularity == RANDOM:
        return None
    requests = []
    for index in indices:
        with contextlib.suppress(DataError):  # already among the failures
            requests.append(questions.request(index))
    requests = [request for request in requests if request.images]
    if not requests:
        return None
    forced = setting.granularity
    budget = Budget(forced) if isinstance(forced, int) else Budget(token_cost=setting.token_cost)
    finest, decoding = Budget(predictor.granularities[-1]), Decoding(questions.max_new_tokens)
    variants: dict[str, Callable[[Request], object]] = {
        "routed": lambda request: predictor.predict([request], budget, decoding),
        "finest": lambda request: predictor.predict([request], finest, decoding),
        "llava_next": llava_next_answerer(predictor, questions.max_new_tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for position, request in enumerate([requests[0], *requests]):
        for name, answer in variants.items():
            start = time.perf_counter()
            answer(request)
            if predictor.model.device.type == "cuda":
                torch.cuda.synchronize()
            if position > 0:
                seconds[name].append(time.perf_counter() - start)
    routed, at_finest, llava_next = (median(seconds[name]) for name in ("routed", "finest", "llava_next"))
    return Speed(len(requests), routed, at_finest, llava_next, at_finest / routed, llava_next / routed)


# ---- levels -------------------------------------------------------------------------------------------------------


def _level_shares(chosen: Mapping[int, StoredAnswer], levels: Sequence[int]) -> dict[str, float]:
    """Share of the images at each level; empty if there are none."""
    counts = Counter(level for answer in chosen.values() for level in answer["granularity"])
    return {str(level): counts[level] / counts.total() for level in levels} if counts else {}


def _compare_levels(
    lines: Mapping[int, Line],
    chosen: Mapping[int, StoredAnswer],
    outcomes: Outcomes,
    levels: Sequence[int],
    questions: Questions,
) -> tuple[Oracle | None, tuple[CurvePoint, ...] | None]:
    """The oracle and the router's curve over prices, from the answers at every level; None if there is no image.

    `chosen` and `outcomes` are the routed answers and their outcomes.
    """
    routed = {index: line for index, line in lines.items() if line["router_log_probs"]}
    if not routed:
        return None, None
    answers = [{index: line["answers"][str(level)] for index, line in routed.items()} for level in levels]
    by_level = [
        score_answers(questions, {index: answer["prediction"] for index, answer in of_level.items()})
        for of_level in answers
    ]

    def headline(choice: Mapping[int, int]) -> tuple[float, list[StoredAnswer]]:
        """The headline's value and the answers if question `i` is answered at the level of index `choice[i]`."""
        picked = {index: by_level[level][index] for index, level in choice.items()}
        metrics = compute_metrics(questions, {index: picked.get(index, outcomes[index]) for index in outcomes})
        return next(iter(metrics.values())).value, [answers[level][index] for index, level in choice.items()]

    score = questions.benchmark.question_score
    scores = torch.tensor([[score(of_level[index]) for of_level in by_level] for index in routed])
    best = dict(zip(routed, scores.argmax(-1).tolist(), strict=True))  # the coarsest of equally good levels
    value, picked = headline(best)
    oracle = Oracle(
        value=value,
        regret=value - next(iter(compute_metrics(questions, outcomes).values())).value,
        agreement=fmean(set(chosen[index]["granularity"]) == {levels[level]} for index, level in best.items()),
        mean_visual_tokens=fmean(answer["num_visual_tokens"] for answer in picked),
    )
    log_probs = torch.stack([torch.tensor(line["router_log_probs"]).mean(0) for line in routed.values()])
    curve = []
    for cost in TOKEN_COSTS:
        choice = level_values(log_probs, levels, cost).argmax(-1).tolist()
        value, picked = headline(dict(zip(routed, choice, strict=True)))
        shares = [
            answer["num_visual_tokens"] / line["finest_visual_tokens"]
            for answer, line in zip(picked, routed.values(), strict=True)
        ]
        curve.append(CurvePoint(cost, value, fmean(shares), fmean(answer["num_visual_tokens"] for answer in picked)))
    return oracle, tuple(curve)
