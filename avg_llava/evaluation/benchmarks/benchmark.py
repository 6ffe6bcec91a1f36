"""Declaration of a benchmark: the source of its questions, its metrics and its published figures.

Modules of this package import neither torch nor lmms-eval when they are loaded, so that the command line can list the
benchmarks cheaply. Scoring functions import what they need of lmms-eval when they are called.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from avg_llava.evaluation.statistics import Metric, MetricKind, compute_value

Protocol = Literal["current", "paper"]
PROTOCOLS: tuple[Protocol, ...] = ("current", "paper")
"""`current`: lmms-eval as pinned in constraints.txt. `paper`: prompts, metrics and answer lengths of the harness that
produced the paper's numbers (LMMS-AVG, lmms-eval 0.1.2)."""

Doc = Mapping[str, Any]
"""A row of a data set."""
Outcome = Mapping[str, Any]
"""The score of one answer: metric -> number, or the record that the metric aggregates."""
Outcomes = Mapping[int, Outcome]
"""Question index -> outcome."""
Metrics = dict[str, Metric | None]
"""Metric name -> metric, the headline first; None where no question has it."""


@dataclass(frozen=True)
class HarnessTask:
    """Questions, prompts and scores of a task of lmms-eval.

    Attributes:
        task: Path of the task's YAML below lmms-eval's folder of tasks, without `.yaml`.
        folder: Name of the data set's repository, and of a local copy of it.
        name_column: Column that identifies a question in messages; None if there is none.
        image_config: Configuration of the same data set that holds the images, joined by the column `imageId`; None if
            the questions hold their images.
        paper: Fields of the task's configuration that the paper's harness set differently.
    """

    task: str
    folder: str
    name_column: str | None = None
    image_config: str | None = None
    paper: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalTask:
    """Questions, prompts and scores defined without lmms-eval. They are the same in both protocols.

    Attributes:
        read: Reads the questions; called with the folder given as `--data`, or None. Rows hold JSON values or bytes.
            `avg_llava.evaluation.questions.read_rows` reads JSON, JSON-lines and Parquet files.
        prompt: The text that the model is asked, with one `<image>` per image or none.
        images: The images of a question: Pillow images, paths of files or contents of files.
        reference: The right answer, recorded beside the model's.
        score: Scores one answer, as metric -> number between 0 and 1.
        max_new_tokens: Maximum length of an answer in tokens.
    """

    read: Callable[[Path | None], Sequence[Doc]]
    prompt: Callable[[Doc], str]
    images: Callable[[Doc], Sequence[Any]]
    reference: Callable[[Doc], Any]
    score: Callable[[Doc, str], Outcome]
    max_new_tokens: int = 16


@dataclass(frozen=True)
class Expected:
    """A published figure and how far from it a measured one may be; percent, or points for MME."""

    benchmark: str
    protocol: Protocol
    metric: str
    published: float
    tolerance: float
    source: str
    note: str


def paper_figure(benchmark: str, metric: str, published: float, tolerance: float, table: int, note: str) -> Expected:
    """A figure of AVG-LLaVA in a table of the paper."""
    source = f"AVG-LLaVA, arXiv 2410.02745v1, table {table}"
    return Expected(benchmark, "paper", metric, published, tolerance, source, note)


def paper_share(
    benchmark: str, metric: str, published: float, tolerance: float, table: int, units: str, remark: str = ""
) -> Expected:
    """A figure that is a share of `units`, such as "900 questions"; `remark` precedes the note on the tolerance."""
    note = f"tolerance: half the 95% interval of such a share of {units}"
    return paper_figure(benchmark, metric, published, tolerance, table, f"{remark}; {note}" if remark else note)


# ---- metrics --------------------------------------------------------------------------------------------------------


def make_metric(kind: MetricKind, label: str, units: dict[str, Any], maximum: float = 1) -> Metric | None:
    """The metric over these units (see `avg_llava.evaluation.statistics.Metric`); None if there are none."""
    return Metric(compute_value(kind, units), kind, maximum, label, units) if units else None


def mean_metric(name: str, label: str, outcomes: Outcomes) -> Metric | None:
    """The mean of the outcomes' number `name` over the questions that have it."""
    units = {str(index): float(outcome[name]) for index, outcome in outcomes.items() if name in outcome}
    return make_metric("mean", label, units)


def exact_match(outcomes: Outcomes, protocol: Protocol) -> Metrics:
    """Mean of `exact_match`: accuracy, or VQA accuracy where the task scores against several annotators' answers."""
    return {"exact_match": mean_metric("exact_match", "accuracy", outcomes)}


def first_number(outcome: Outcome) -> float:
    """The number of an outcome's first metric, or the `score` of its record."""
    first = next(iter(outcome.values()))
    return float(first["score"] if isinstance(first, Mapping) else first)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        title: Name in tables and figures.
        num_questions: Number of questions of the split; a result on fewer is marked as partial.
        source: The questions.
        metrics: Computes the metrics from the outcomes of all questions, the headline first.
        question_score: Score of one outcome between 0 and 1, by which levels are compared and answers recorded.
        expected: Published figures with tolerances.
    """

    title: str
    num_questions: int
    source: HarnessTask | LocalTask
    metrics: Callable[[Outcomes, Protocol], Metrics] = exact_match
    question_score: Callable[[Outcome], float] = first_number
    expected: tuple[Expected, ...] = ()
