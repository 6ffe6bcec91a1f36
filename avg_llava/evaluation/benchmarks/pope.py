"""POPE: yes-or-no questions about objects in an image, F1 of `yes` over all three splits."""

from avg_llava.evaluation.benchmarks.benchmark import (
    Benchmark,
    HarnessTask,
    Metrics,
    Outcomes,
    Protocol,
    make_metric,
    paper_share,
)

CELLS = {("yes", "yes"): "tp", ("yes", "no"): "fp", ("no", "no"): "tn", ("no", "yes"): "fn"}
"""(prediction, reference) -> cell of the confusion matrix; any other prediction is `other`."""


def f1(outcomes: Outcomes, protocol: Protocol) -> Metrics:
    """F1, accuracy, precision and recall."""
    records = {str(index): outcome["pope_accuracy"] for index, outcome in outcomes.items()}
    cells = {
        index: CELLS.get((record["prediction"], record["ground_truth"]), "other") for index, record in records.items()
    }
    scores = {index: record["score"] for index, record in records.items()}
    return {
        "pope_f1_score": make_metric("f1", "F1", cells),
        "pope_accuracy": make_metric("mean", "accuracy", scores),
        "pope_precision": make_metric("precision", "precision", cells),
        "pope_recall": make_metric("recall", "recall", cells),
    }


BENCHMARK = Benchmark(
    title="POPE",
    num_questions=9000,
    source=HarnessTask("pope/pope", folder="POPE", name_column="question_id"),
    metrics=f1,
    expected=(
        paper_share(
            "pope",
            "pope_f1_score",
            87.4,
            tolerance=0.7,
            table=2,
            units="9,000 questions",
            remark="the paper does not say F1 or accuracy; other rows of its table mix metrics",
        ),
    ),
)
