"""Commands of the mini world."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from avg_llava.cli.options import NUMBER, Group, NumWorkers, Outcome, ReportingCommand, command, unset


@dataclass(frozen=True, kw_only=True)
class SeededCommand(ReportingCommand):
    """A command that writes a folder of generated files."""

    output: Path
    """Folder to write."""
    seed: int = 0
    """Seed of all random numbers."""


@command("avg-llava mini data --output playground/data/mini")
class MiniData(SeededCommand):
    """Generates the mini world: images and questions that need different granularities."""

    def compute(self) -> Outcome:
        from avg_llava.mini.world import write_world

        manifest = write_world(self.output, seed=self.seed)
        return Outcome(manifest, f"the mini world is in {self.output}")


@command("avg-llava mini benchmarks --output playground/data/benchmarks")
class MiniBenchmarks(SeededCommand):
    """Generates twelve small benchmarks in the published formats."""

    def compute(self) -> Outcome:
        from avg_llava.mini.benchmarks import write_benchmarks

        manifest = write_benchmarks(self.output, seed=self.seed)
        return Outcome(manifest, f"the benchmarks are in {self.output}")


@command("avg-llava mini pretrain --output backbones")
class MiniPretrain(SeededCommand):
    """Pretrains the mini backbones: CLIP tower, language model and tokenizer."""

    def compute(self) -> Outcome:
        from avg_llava.mini.backbones import Recipe, pretrain

        pretrain(self.output, Recipe(seed=self.seed))
        return Outcome({"output": str(self.output)}, f"the backbones are in {self.output}")


@command("avg-llava mini claims --runs runs/mini --data playground/data/mini --check")
class MiniClaims(ReportingCommand):
    """Compares all ways to choose a level, and writes the report."""

    runs: Path = Path("runs/mini")
    """Folder that contains stage1 to stage4."""
    data: Path = Path("playground/data/mini")
    """Folder of the mini world."""
    output: Annotated[Path | None, unset("<runs>/report")] = None
    """Folder of the report."""
    token_cost: Annotated[float | None, NUMBER, unset("chosen on training data")] = None
    """Price at which the router is evaluated, in nats per doubling of visual tokens."""
    workers: NumWorkers = None
    """Number of worker processes."""
    check: bool = False
    """Fail if a claim does not hold."""

    def compute(self) -> Outcome:
        from avg_llava.mini.comparison import evaluate_claims
        from avg_llava.reports.mini import table_lines

        output = self.output or self.runs / "report"
        report = evaluate_claims(self.runs, self.data, output, self.token_cost, self.workers)
        text = "\n".join([*table_lines(report), "", f"report: {output / 'index.html'}"])
        return Outcome(report, text, failed=self.check and not all(claim["held"] for claim in report["claims"]))


@command("avg-llava mini routers --model avg_llava/mini/checkpoint --answers runs/answers runs/a runs/b")
class MiniRouters(ReportingCommand):
    """Compares routers of one language model, such as those of an ablation of router training."""

    routers: Annotated[tuple[Path, ...], Positional, arg(metavar="DIR [DIR ...]", help_behavior_hint="(required)")]
    """Checkpoint folders that contain a router."""
    model: Path
    """Checkpoint folder of the model that answers, at all levels."""
    answers: Path
    """Folder in which its answers are stored."""
    data: Path = Path("playground/data/mini")
    """Folder of the mini world."""
    workers: NumWorkers = None
    """Number of worker processes."""

    def __post_init__(self) -> None:
        if not self.routers:
            raise ValueError("give at least one checkpoint folder that contains a router")

    def compute(self) -> Outcome:
        from avg_llava.mini.comparison import compare_routers
        from avg_llava.reports.mini import table_lines

        rows = compare_routers(self.model, self.routers, self.data, self.answers, num_workers=self.workers)
        report: dict[str, Any] = {"rows": [asdict(row) for row in rows], "claims": []}
        return Outcome(report, "\n".join(table_lines(report)).rstrip())


MINI = Group(
    "The generated world of the quickstart.",
    "avg-llava mini data --output playground/data/mini",
    {
        "data": MiniData,
        "benchmarks": MiniBenchmarks,
        "pretrain": MiniPretrain,
        "claims": MiniClaims,
        "routers": MiniRouters,
    },
)
