"""MMBench dev in English and Chinese: accuracy over all rotations of the options, without a paid judge.

lmms-eval's rules extract the letter from an answer; an answer they cannot parse is wrong. Today's harness applies a
second set of rules where the paper's harness asked a paid judge.
"""

from functools import partial
from typing import Any, Literal

from avg_llava.evaluation.benchmarks.benchmark import (
    Benchmark,
    HarnessTask,
    Metrics,
    Outcome,
    Outcomes,
    Protocol,
    make_metric,
    paper_share,
)

Language = Literal["en", "cn"]
ROTATION = 1_000_000
"""A question is asked once per rotation of its options; each rotation adds this to the question's index."""


def circular_accuracy(outcomes: Outcomes, protocol: Protocol, language: Language) -> Metrics:
    """Share of base questions that are answered correctly in every rotation."""
    import pandas as pd

    evaluator = _evaluator(language)
    table = pd.DataFrame([outcome["gpt_eval_score"] for outcome in outcomes.values()]).sort_values(by="index")
    references = dict(zip(table["index"], table["answer"], strict=True))
    units = {}
    for base, rotations in table.groupby(table["index"] % ROTATION):
        if base not in references:
            continue
        if protocol == "current":
            is_right = evaluator.eval_sub_data(rotations, references, static_only=True)
        else:
            letters = [evaluator.prefetch_answer(row) for _, row in rotations.iterrows()]
            is_right = letters == list(rotations["answer"])
        units[str(base)] = float(is_right)
    return {"circular_accuracy": make_metric("mean", "circular accuracy", units)}


def score_rotation(outcome: Outcome, language: Language) -> float:
    """1 if the letter of a single rotation is right."""
    import pandas as pd

    record = outcome["gpt_eval_score"]
    return float(_evaluator(language).prefetch_answer(pd.Series(record)) == record["answer"])


def _evaluator(language: Language) -> Any:
    if language == "en":
        from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator
    else:
        from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator
    return mmbench_evaluator


def _benchmark(name: str, language: Language, title: str, task: str, published: float, tolerance: float) -> Benchmark:
    remark = "the paper does not name the split, and its harness asked a paid judge; measured on dev without one"
    units = "1,164 base questions"
    return Benchmark(
        title=title,
        num_questions=4329,
        source=HarnessTask(task, folder="MMBench", name_column="index"),
        metrics=partial(circular_accuracy, language=language),
        question_score=partial(score_rotation, language=language),
        expected=(paper_share(name, "circular_accuracy", published, tolerance, 2, units, remark),),
    )


ENGLISH = _benchmark("mmbench", "en", "MMBench", "mmbench/mmbench_en_dev_static", 69.9, 2.7)
CHINESE = _benchmark("mmbench_cn", "cn", "MMBench-CN", "mmbench/mmbench_cn_dev", 61.8, 2.8)
