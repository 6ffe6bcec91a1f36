"""AI2D, test: accuracy of the option's letter."""

from avg_llava.evaluation.benchmarks.benchmark import Benchmark, HarnessTask, paper_figure

BENCHMARK = Benchmark(
    title="AI2D",
    num_questions=3088,
    # Today's filter extracts the letter of "A. text"; the paper's harness compared the answer as it is.
    source=HarnessTask("ai2d/ai2d", folder="ai2d", paper={"filter_list": None}),
    expected=(
        paper_figure(
            "ai2d",
            "exact_match",
            67.3,
            tolerance=1.7,
            table=1,
            note="tolerance: half the 95% interval of such a share of 3,088 questions",
        ),
    ),
)
