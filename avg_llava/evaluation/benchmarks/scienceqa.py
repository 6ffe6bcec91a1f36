"""ScienceQA, test questions with an image: accuracy of the option's letter."""

from collections.abc import Sequence

from avg_llava.evaluation.benchmarks.benchmark import Benchmark, Doc, HarnessTask, paper_share


def score_as_in_paper(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Accepts the letter alone or followed by a full stop; today's task also accepts small letters."""
    answer, expected = results[0].strip(), "ABCDE"[doc["answer"]]
    return {"exact_match": float(answer == expected or answer.startswith(f"{expected}."))}


BENCHMARK = Benchmark(
    title="ScienceQA-IMG",
    num_questions=2017,
    source=HarnessTask("scienceqa/scienceqa_img", folder="ScienceQA", paper={"process_results": score_as_in_paper}),
    expected=(paper_share("scienceqa", "exact_match", 71.1, tolerance=2.0, table=1, units="2,017 questions"),),
)
