"""TextVQA, validation: VQA accuracy against ten annotators; the prompt holds no OCR tokens."""

from avg_llava.evaluation.benchmarks.benchmark import Benchmark, HarnessTask, paper_share

BENCHMARK = Benchmark(
    title="TextVQA",
    num_questions=5000,
    source=HarnessTask("textvqa/textvqa_val", folder="textvqa", name_column="question_id"),
    expected=(
        paper_share(
            "textvqa",
            "exact_match",
            67.1,
            tolerance=1.4,
            table=1,
            units="5,000 questions",
            remark="without OCR tokens in the prompt",
        ),
    ),
)
