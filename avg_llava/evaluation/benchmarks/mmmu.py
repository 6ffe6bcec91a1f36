"""MMMU, validation: accuracy of letters and of short open answers, with up to seven images per question.

Where lmms-eval finds no letter in an answer it guesses one, from the seed that `avg_llava.evaluation.evaluate` sets.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

from avg_llava.evaluation.benchmarks.benchmark import (
    Benchmark,
    Doc,
    HarnessTask,
    Metrics,
    Outcome,
    Outcomes,
    Protocol,
    make_metric,
    paper_share,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def prompt_as_in_paper(doc: Doc, settings: Mapping[str, Any] | None = None) -> str:
    """The question with `<image>` at the position of each image.

    Today's task leaves `<image 1>` as text and puts the images first.
    """
    lines = [doc["question"]]
    if doc["question_type"] == "multiple-choice":
        options = ast.literal_eval(doc["options"])
        lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
        lines.append("Answer with the option letter from the given choices directly.")
    else:
        lines.append("Answer the question using a single word or phrase.")
    return re.sub(r"<image \d+>", "<image>", "\n".join(lines))


def images_as_in_paper(doc: Doc) -> list[Any]:
    """One image per `<image>` of the prompt, in order."""
    numbers = re.findall(r"<image (\d+)>", f"{doc['question']}\n{doc['options']}")
    return [doc[f"image_{number}"] for number in numbers]


def accuracy(outcomes: Outcomes, protocol: Protocol) -> Metrics:
    """Accuracy over all questions."""
    units = {str(index): score_question(outcome) for index, outcome in outcomes.items()}
    return {"mmmu_acc": make_metric("mean", "accuracy", units)}


def score_question(outcome: Outcome) -> float:
    """1 if the answer is right."""
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    return float(evaluate_mmmu([outcome["mmmu_acc"]])[1]["acc"])


BENCHMARK = Benchmark(
    title="MMMU",
    num_questions=900,
    source=HarnessTask(
        "mmmu/mmmu_val",
        folder="MMMU",
        name_column="id",
        paper={
            "doc_to_text": prompt_as_in_paper,
            "doc_to_visual": images_as_in_paper,
            "generation_kwargs": {"max_new_tokens": 16},
        },
    ),
    metrics=accuracy,
    question_score=score_question,
    expected=(
        paper_share(
            "mmmu",
            "mmmu_acc",
            37.4,
            tolerance=3.2,
            table=2,
            units="900 questions",
            remark="answers without a letter are guessed at random",
        ),
    ),
)
