"""Scores answers: outcomes of single answers, and metrics of a benchmark."""

import contextlib
import random
import sys
from collections.abc import Mapping

from avg_llava.evaluation.benchmarks.benchmark import Outcome, Outcomes
from avg_llava.evaluation.questions import Questions
from avg_llava.evaluation.statistics import Metric

SEED = 0
"""The seed of lmms-eval; MMMU guesses a letter for answers without one."""


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
