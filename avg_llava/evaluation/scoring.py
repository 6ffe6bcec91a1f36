"""From answers to a benchmark's metrics: lmms-eval judges each answer, this module says what a metric is made of.

Every metric comes with its units (see `avg_llava.evaluation.results.Metric`), from which intervals and tests are made.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator as chinese_judge
from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator as english_judge
from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

from avg_llava.evaluation.benchmarks import Protocol
from avg_llava.evaluation.results import Metric
from avg_llava.evaluation.statistics import MetricKind, compute_value
from avg_llava.evaluation.tasks import BenchmarkQuestions, quiet_harness

Outcomes = Mapping[int, Mapping[str, Any]]
"""Question number -> what lmms-eval makes of its answer."""

SEED = 0
"""MMMU guesses where it finds no letter: from lmms-eval's own seed on, in the order of the questions."""
ROTATION = 1_000_000
"""MMBench's questions come with their options rotated, numbered in steps of this."""
NUM_MME_QUESTIONS = 2
"""MME asks two questions about an image, and rewards both being right."""


def judge(questions: BenchmarkQuestions, answers: Mapping[int, str]) -> dict[int, dict[str, Any]]:
    """What lmms-eval makes of each answer, in the order of the questions."""
    state = random.getstate()
    random.seed(SEED)
    try:
        return {index: questions.outcome(index, answers[index]) for index in sorted(answers)}
    finally:
        random.setstate(state)


def compute_metrics(questions: BenchmarkQuestions, outcomes: Outcomes) -> dict[str, Metric]:
    """The metrics of judged answers, the headline first.

    Raises:
        ValueError: if there is no outcome.
    """
    if not outcomes:
        raise ValueError(f"{questions.name}: no question was answered, so there is no score")
    return {name: metric for name, metric in _METRICS[questions.name](outcomes, questions.protocol).items() if metric}


def question_score(questions: BenchmarkQuestions, outcome: Mapping[str, Any]) -> float:
    """How right one answer is, between 0 and 1, whatever else the metric looks at."""
    if questions.name in _JUDGES:
        record = outcome["gpt_eval_score"]
        return float(_JUDGES[questions.name].prefetch_answer(pd.Series(record)) == record["answer"])
    if questions.name == "mmmu":
        return float(evaluate_mmmu([outcome["mmmu_acc"]])[1]["acc"])
    first = next(iter(outcome.values()))
    return float(first["score"] if isinstance(first, Mapping) else first)


# ---- what a metric is made of -------------------------------------------------------------------------------------


def _metric(kind: MetricKind, label: str, units: dict[str, Any], maximum: float = 1) -> Metric | None:
    return Metric(compute_value(kind, units), kind, maximum, label, units) if units else None


def _share(name: str, label: str, outcomes: Outcomes) -> Metric | None:
    """The mean of a number over the questions that have it."""
    units = {str(index): float(outcome[name]) for index, outcome in outcomes.items() if name in outcome}
    return _metric("mean", label, units)


def _exact_match(outcomes: Outcomes, protocol: Protocol) -> dict[str, Metric | None]:
    return {"exact_match": _share("exact_match", "accuracy", outcomes)}


def _chartqa(outcomes: Outcomes, protocol: Protocol) -> dict[str, Metric | None]:
    return {
        f"relaxed_{part}": _share(f"relaxed_{part}", f"relaxed accuracy, {part.replace('_split', '')}", outcomes)
        for part in ("overall", "human_split", "augmented_split")
    }


def _docvqa(outcomes: Outcomes, protocol: Protocol) -> dict[str, Metric | None]:
    """True ANLS, and what the paper's harness called ANLS: there, every score above 0 became 1."""
    above = {index: {"anls": float(outcome["anls"] > 0)} for index, outcome in outcomes.items()}
    metrics = {
        "anls": _share("anls", "ANLS", outcomes),
        "anls_binarised": _share("anls", "share of answers with ANLS >= 0.5", above),
    }
    return metrics if protocol == "current" else dict(reversed(metrics.items()))


def _mme(outcomes: Outcomes, protocol: Protocol) -> dict[str, Metric | None]:
    return {
        "mme_perception_score": _mme_part(outcomes, "mme_perception_score", "perception", 2000),
        "mme_cognition_score": _mme_part(outcomes, "mme_cognition_score", "cognition", 800),
    }


def _mme_part(outcomes: Outcomes, name: str, label: str, maximum: int) -> Metric | None:
    """Per image accuracy in percent, plus 100 where both questions are right. Images with one answer have no part."""
    images = defaultdict(list)
    for outcome in outcomes.values():
        if name in outcome:
            record = outcome[name]
            images[record["category"], record["question_id"]].append(record["score"])
    units = {
        f"{category}/{image}": [100 * sum(scores) / 2 + 100 * (sum(scores) == 2), category]
        for (category, image), scores in images.items()
        if len(scores) == NUM_MME_QUESTIONS
    }
    return _metric("stratum_sum", label, units, maximum)


def _pope(outcomes: Outcomes, protocol: Protocol) -> dict[str, Metric | None]:
    records = {str(index): outcome["pope_accuracy"] for index, outcome in outcomes.items()}
    cells = {("yes", "yes"): "tp", ("yes", "no"): "fp", ("no", "no"): "tn", ("no", "yes"): "fn"}
    said = {
        index: cells.get((record["prediction"], record["ground_truth"]), "other") for index, record in records.items()
    }
    return {
        "pope_f1_score": _metric("f1", "F1", said),
        "pope_accuracy": _metric("mean", "accuracy", {index: record["score"] for index, record in records.items()}),
        "pope_precision": _metric("precision", "precision", said),
        "pope_recall": _metric("recall", "recall", said),
    }


_JUDGES = {"mmbench": english_judge, "mmbench_cn": chinese_judge}


def _mmbench(judge_of_language: Any) -> Callable[[Outcomes, Protocol], dict[str, Metric | None]]:
    """A base question counts if it is right in all rotations. No paid judge: what the rules cannot read is wrong.

    The rules are lmms-eval's; today's go on to a second set of rules where the paper's harness asked a judge.
    """

    def compute(outcomes: Outcomes, protocol: Protocol) -> dict[str, Metric | None]:
        records = [outcome["gpt_eval_score"] for outcome in outcomes.values()]
        table = pd.DataFrame(records).sort_values(by="index")
        right = dict(zip(table["index"], table["answer"], strict=True))
        units = {}
        for base, rotations in table.groupby(table["index"] % ROTATION):
            if base not in right:
                continue
            if protocol == "current":
                with quiet_harness():
                    hit = judge_of_language.eval_sub_data(rotations, right, static_only=True)
            else:
                said = [judge_of_language.prefetch_answer(row) for _, row in rotations.iterrows()]
                hit = said == list(rotations["answer"])
            units[str(base)] = float(hit)
        return {"circular_accuracy": _metric("mean", "circular accuracy", units)}

    return compute


def _mmmu(outcomes: Outcomes, protocol: Protocol) -> dict[str, Metric | None]:
    units = {str(index): float(evaluate_mmmu([outcome["mmmu_acc"]])[1]["acc"]) for index, outcome in outcomes.items()}
    return {"mmmu_acc": _metric("mean", "accuracy", units)}


_METRICS: dict[str, Callable[[Outcomes, Protocol], dict[str, Metric | None]]] = {
    "gqa": _exact_match,
    "scienceqa": _exact_match,
    "vizwiz": _exact_match,
    "textvqa": _exact_match,
    "chartqa": _chartqa,
    "docvqa": _docvqa,
    "ai2d": _exact_match,
    "mme": _mme,
    **{name: _mmbench(judge_of_language) for name, judge_of_language in _JUDGES.items()},
    "pope": _pope,
    "mmmu": _mmmu,
}

__all__ = ["compute_metrics", "judge", "question_score"]
