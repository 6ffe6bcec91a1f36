"""MME: perception and cognition in points; two yes-or-no questions per image."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from avg_llava.evaluation.benchmarks.benchmark import (
    Benchmark,
    Doc,
    HarnessTask,
    Metrics,
    Outcomes,
    Protocol,
    make_metric,
    paper_figure,
)
from avg_llava.evaluation.statistics import Metric

QUESTIONS_PER_IMAGE = 2
TOLERANCE_NOTE = (
    "tolerance: half the 95% interval, from the spread of image pairs' scores in categories of 20 to 200 pairs"
)


def score_as_in_paper(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Looks for yes or no in the first four characters; today's task also accepts a lone y or n."""
    from lmms_eval.tasks.mme.utils import eval_type_dict

    answer = results[0].lower().strip().replace(".", "")
    parsed = next((word for word in ("yes", "no") if word in answer[:4]), "other")
    part = "perception" if doc["category"] in eval_type_dict["Perception"] else "cognition"
    record = {
        "question_id": doc["question_id"],
        "category": doc["category"],
        "score": float(parsed == doc["answer"].lower().strip().replace(".", "")),
    }
    return {f"mme_{part}_score": record}


def points(outcomes: Outcomes, protocol: Protocol) -> Metrics:
    """Perception (at most 2000) and cognition (at most 800)."""
    return {
        "mme_perception_score": _sum_of_categories(outcomes, "mme_perception_score", "perception", 2000),
        "mme_cognition_score": _sum_of_categories(outcomes, "mme_cognition_score", "cognition", 800),
    }


def _sum_of_categories(outcomes: Outcomes, name: str, label: str, maximum: int) -> Metric | None:
    """Per image: accuracy in percent, plus 100 if both answers are right. Images with one answer only are left out."""
    images = defaultdict(list)
    for outcome in outcomes.values():
        if name in outcome:
            record = outcome[name]
            images[record["category"], record["question_id"]].append(record["score"])
    units = {
        f"{category}/{image}": [100 * sum(scores) / 2 + 100 * (sum(scores) == 2), category]
        for (category, image), scores in images.items()
        if len(scores) == QUESTIONS_PER_IMAGE
    }
    return make_metric("stratum_sum", label, units, maximum)


BENCHMARK = Benchmark(
    title="MME",
    num_questions=2374,
    source=HarnessTask(
        "mme/mme", folder="MME", name_column="question_id", paper={"process_results": score_as_in_paper}
    ),
    metrics=points,
    expected=(
        paper_figure("mme", "mme_perception_score", 1557.4, tolerance=70.0, table=2, note=TOLERANCE_NOTE),
        paper_figure("mme", "mme_cognition_score", 366.8, tolerance=70.0, table=2, note=TOLERANCE_NOTE),
    ),
)
