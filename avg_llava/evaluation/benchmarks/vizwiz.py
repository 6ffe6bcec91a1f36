"""VizWiz-VQA, validation: VQA accuracy against ten annotators; the prompt allows the answer `Unanswerable`."""

from avg_llava.evaluation.benchmarks.benchmark import Benchmark, HarnessTask, paper_share

BENCHMARK = Benchmark(
    title="VizWiz",
    num_questions=4319,
    source=HarnessTask("vizwiz_vqa/vizwiz_vqa_val", folder="VizWiz-VQA", name_column="question_id"),
    expected=(
        paper_share(
            "vizwiz",
            "exact_match",
            59.8,
            tolerance=1.5,
            table=1,
            units="4,319 questions",
            remark="the paper does not name the split; measured on val",
        ),
    ),
)
