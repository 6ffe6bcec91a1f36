"""GQA, testdev balanced: exact match of a single word or phrase."""

from avg_llava.evaluation.benchmarks.benchmark import Benchmark, HarnessTask, paper_share

BENCHMARK = Benchmark(
    title="GQA",
    num_questions=12578,
    source=HarnessTask("gqa/gqa", folder="GQA", name_column="id", image_config="testdev_balanced_images"),
    expected=(paper_share("gqa", "exact_match", 63.0, tolerance=0.9, table=1, units="12,578 questions"),),
)
