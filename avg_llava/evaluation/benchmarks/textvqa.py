"""TextVQA, validation: VQA accuracy against ten annotators; the prompt holds no OCR tokens."""

from avg_llava.evaluation.benchmarks.benchmark import Benchmark, HarnessTask, paper_figure

BENCHMARK = Benchmark(
    title="TextVQA",
    num_questions=5000,
    source=HarnessTask("textvqa/textvqa_val", folder="textvqa", name_column="question_id"),
    expected=(
        paper_figure(
            "textvqa",
            "exact_match",
            67.1,
            tolerance=1.4,
            table=1,
            note="without OCR tokens in the prompt; tolerance: half the 95% interval of such a share of 5,000 "
            "questions",
        ),
    ),
)
