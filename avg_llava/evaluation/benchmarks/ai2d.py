"""AI2D, test: accuracy of the option's letter."""

from avg_llava.evaluation.benchmarks.benchmark import Benchmark, HarnessTask, paper_share

BENCHMARK = Benchmark(
    title="AI2D",
    num_questions=3088,
    # Today's filter extracts the letter of "A. text"; the paper's harness compared the answer as it is.
    source=HarnessTask("ai2d/ai2d", folder="ai2d", paper={"filter_list": None}),
    expected=(paper_share("ai2d", "exact_match", 67.3, tolerance=1.7, table=1, units="3,088 questions"),),
)
