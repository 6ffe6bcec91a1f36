"""Commands that evaluate a model on benchmarks and report the results."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from avg_llava.cli.options import (
    COUNT,
    Count,
    DType,
    NumWorkers,
    Outcome,
    ReportingCommand,
    TokenCost,
    command,
    parsed_by,
    unset,
)

if TYPE_CHECKING:
    from avg_llava.evaluation.published import Comparison
    from avg_llava.evaluation.results import Result


def _granularity(text: str) -> str | int:
    if text in ("auto", "random", "all"):
        return text
    if text.isdecimal():
        return int(text)
    raise ValueError(f"{text!r} is none of auto, random, all, and no number of visual tokens per crop")


@command("avg-llava evaluate --benchmark textvqa --model checkpoints/avg-llava-7b --output runs/eval")
class Evaluate(ReportingCommand):
    """Scores a model on a benchmark; run again, an interrupted evaluation continues."""

    benchmark: Annotated[str, arg(metavar="NAME")]
    """Name of a benchmark (docs/evaluation.md lists them), or all."""
    model: Path
    """Checkpoint folder."""
    output: Path = Path("runs/eval")
    """Folder of the results."""
    data: Annotated[Path | None, unset("the hub")] = None
    """Folder with local copies of the data sets."""
    protocol: Literal["current", "paper"] = "current"
    """Prompts and metrics: those of the installed lmms-eval, or those of the paper's harness."""
    granularity: Annotated[Literal["auto", "random", "all"] | int, parsed_by(_granularity, "N|auto|random|all")] = (
        "auto"
    )
    """Visual tokens per crop. auto: chosen by the router; random: uniformly sampled; all: the router and every level,
    for the oracle and the curve over token_cost."""
    token_cost: TokenCost = 0.0
    """The router's price in nats per doubling of visual tokens; 0 is the paper."""
    limit: Annotated[int | None, COUNT, unset("all questions")] = None
    """Evaluate only the first N questions."""
    batch_size: Count = 1
    """Questions per batch."""
    workers: NumWorkers = None
    """Number of worker processes."""
    timed: int = 16
    """Questions on which the time is compared with the finest level and with LLaVA-NeXT; 0: none."""
    dtype: DType = "float32"
    """Data type of the weights."""
    check: Annotated[Path | None, unset("none")] = None
    """File of expected figures, or `published` for the paper's; exit with 1 if a measured one differs."""

    def compute(self) -> Outcome:
        import torch

        from avg_llava.common.tables import render_table
        from avg_llava.evaluation.answering import ModelLoader, Setting
        from avg_llava.evaluation.benchmarks import BENCHMARKS
        from avg_llava.evaluation.evaluate import evaluate
        from avg_llava.evaluation.published import compare_with_expected, load_expected

        names = list(BENCHMARKS) if self.benchmark == "all" else [self.benchmark]
        if not set(names) <= set(BENCHMARKS):
            raise ValueError(f"{self.benchmark!r} is no benchmark; there are {', '.join(BENCHMARKS)}, and all")
        expected = load_expected(self.check, names) if self.check else []
        results, differences, failures = [], [], []
        rows: list[tuple[str, ...]] = []
        loader = ModelLoader(self.model, getattr(torch, self.dtype))
        for name in names:
            setting = Setting(
                benchmark=name,
                model=self.model,
                protocol=self.protocol,
                granularity=self.granularity,
                token_cost=self.token_cost,
                data=self.data,
                limit=self.limit,
                batch_size=self.batch_size,
                dtype=loader.dtype,
            )
            result = evaluate(setting, self.output, self.workers, self.timed, loader)
            results.append(result)
            failures += [f"failed: {failure.error}" for failure in result.failures]
            comparisons = compare_with_expected(result, expected)
            differences += [f"{name} {item.expected.metric}" for item in comparisons if not item.agrees]
            rows += _rows(result, {item.expected.metric: item for item in comparisons})
        notes = [*failures, *(f"differs from what is expected: {name}" for name in differences)]
        text = "\n".join([render_table(_COLUMNS, rows, num_left=2), *notes])
        return Outcome([asdict(result) for result in results], text, failed=bool(notes))


@command("avg-llava report runs/eval/gqa.json runs/eval/mme.json --output runs/report")
class Report(ReportingCommand):
    """Makes the paper's tables and figures from result files, published rows beside measured ones."""

    results: Annotated[
        tuple[Path, ...], Positional, arg(metavar="RESULT [RESULT ...]", help_behavior_hint="(required)")
    ]
    """Results of `avg-llava evaluate`, or report.json of the mini world."""
    against: Annotated[tuple[Path, ...], arg(metavar="RESULT [RESULT ...]", help_behavior_hint="(default: none)")] = ()
    """Results of another run, for paired tests on every benchmark of both runs."""
    output: Path = Path("runs/report")
    """Folder for index.html, tables (.md, .tex) and figures (.png, .svg)."""

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("give at least one result file")

    def compute(self) -> Outcome:
        from avg_llava.reports.paper import write_paper_report

        report = write_paper_report(self.results, self.against, self.output)
        return Outcome(report.to_json(), f"{report.to_text()}\nreport: {report.files[0]}")


_COLUMNS = ("benchmark", "metric", "measured", "expected", "questions", "failed", "tokens", "s")


def _rows(result: "Result", comparisons: "Mapping[str, Comparison]") -> Iterator[tuple[str, ...]]:
    """One row per metric: its value in percent or points, and the benchmark's token share and seconds per question."""
    from avg_llava.evaluation.published import in_table_units

    for name, metric in result.metrics.items():
        yield (
            result.benchmark,
            metric.label,
            f"{in_table_units(metric, metric.value):.1f}",
            f"{comparisons[name].expected.published:.1f}" if name in comparisons else "",
            str(result.dataset.num_questions),
            str(result.num_failed),
            f"{result.efficiency.token_share:.1%}",
            f"{result.efficiency.seconds_per_question.median:.3f}",
        )
