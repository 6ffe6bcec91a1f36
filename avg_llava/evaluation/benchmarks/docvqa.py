"""DocVQA, validation: ANLS, and the share of answers with an ANLS of at least 0.5."""

from avg_llava.evaluation.benchmarks.benchmark import (
    Benchmark,
    HarnessTask,
    Metrics,
    Outcomes,
    Protocol,
    mean_metric,
    paper_share,
)


def anls(outcomes: Outcomes, protocol: Protocol) -> Metrics:
    """ANLS, and what the paper's harness called ANLS: it counted every score above 0 (that is, from 0.5) as 1.

    The headline is the metric of the protocol.
    """
    above = {index: {"anls": float(outcome["anls"] > 0)} for index, outcome in outcomes.items()}
    metrics = {
        "anls": mean_metric("anls", "ANLS", outcomes),
        "anls_binarised": mean_metric("anls", "share of answers with ANLS >= 0.5", above),
    }
    return metrics if protocol == "current" else dict(reversed(metrics.items()))


BENCHMARK = Benchmark(
    title="DocVQA",
    num_questions=5349,
    source=HarnessTask("docvqa/docvqa_val", folder="DocVQA", name_column="questionId"),
    metrics=anls,
    expected=(
        paper_share(
            "docvqa",
            "anls_binarised",
            74.6,
            tolerance=1.2,
            table=1,
            units="5,349 questions",
            remark="the paper's harness counted every answer with an ANLS of at least 0.5 as 1",
        ),
    ),
)
