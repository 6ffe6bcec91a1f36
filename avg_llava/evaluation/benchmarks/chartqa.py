"""ChartQA, test: relaxed accuracy (numbers within 5%), over all questions and per half of the test set."""

from avg_llava.evaluation.benchmarks.benchmark import (
    Benchmark,
    HarnessTask,
    Metrics,
    Outcomes,
    Protocol,
    mean_metric,
    paper_share,
)


def relaxed_accuracy(outcomes: Outcomes, protocol: Protocol) -> Metrics:
    """Relaxed accuracy overall, on human-written questions and on augmented ones."""
    labels = {"overall": "overall", "human_split": "human", "augmented_split": "augmented"}
    return {
        f"relaxed_{part}": mean_metric(f"relaxed_{part}", f"relaxed accuracy, {label}", outcomes)
        for part, label in labels.items()
    }


BENCHMARK = Benchmark(
    title="ChartQA",
    num_questions=2500,
    source=HarnessTask("chartqa/chartqa", folder="ChartQA"),
    metrics=relaxed_accuracy,
    expected=(paper_share("chartqa", "relaxed_overall", 66.3, tolerance=1.9, table=1, units="2,500 questions"),),
)
