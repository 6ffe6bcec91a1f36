"""Results grouped by series: one model, one way of choosing levels, one protocol. A row of a table is one series."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from avg_llava.evaluation.benchmarks import BENCHMARKS, PROTOCOLS, Protocol
from avg_llava.evaluation.results import Result, ResultError


@dataclass(frozen=True)
class Measured:
    """A result and its file."""

    path: Path
    result: Result


@dataclass(frozen=True)
class Series:
    """One row of a table, or one line of a chart.

    Attributes:
        model: Short name of the model, unique among the models of a report.
        granularity: `auto`, `random`, `all` or tokens per crop.
        token_cost: The router's price in nats per doubling of visual tokens.
        ablation: The training ablation, by its letter in the paper's table 4.
    """

    model: str
    granularity: str | int
    token_cost: float
    protocol: Protocol
    granularities: tuple[int, ...]
    ablation: str | None

    @property
    def is_routed(self) -> bool:
        """True if the router chose the levels."""
        return self.granularity in ("auto", "all")

    @property
    def chooser(self) -> str:
        """The way of choosing levels, in words."""
        if isinstance(self.granularity, int):
            return f"fixed, {self.granularity}"
        if not self.is_routed:
            return "random"
        every = " (all levels)" if self.granularity == "all" else ""  # answered for the oracle
        return f"router{f', cost {self.token_cost:g}' if self.token_cost else ''}{every}"

    @property
    def labels(self) -> tuple[str, ...]:
        """The label cells of the row."""
        return self.model, self.chooser, self.protocol


SeriesResults = Mapping[Series, Mapping[str, Measured]]


def group(measured: Sequence[Measured]) -> SeriesResults:
    """Groups results by series and benchmark.

    Models are in the order of the files. Within a model, the current protocol comes before the paper's; then fixed
    levels from coarse to fine, random levels, and the router at rising prices. Benchmarks are in the order of
    `BENCHMARKS`.

    Raises:
        ResultError: Two files hold the same benchmark in the same series.
    """
    names = _model_names([entry.result for entry in measured])
    grouped: dict[Series, dict[str, Measured]] = {}
    for entry in measured:
        result = entry.result
        series = Series(
            names[_identity(result)],
            result.granularity,
            result.token_cost,
            result.protocol,
            result.model.granularities,
            result.model.ablation,
        )
        others = grouped.setdefault(series, {})
        if result.benchmark in others:
            raise ResultError(
                f"{entry.path} and {others[result.benchmark].path} both hold {result.benchmark} of "
                f"{', '.join(series.labels)}; name one of them"
            )
        others[result.benchmark] = entry
    models = list(dict.fromkeys(series.model for series in grouped))

    def order(series: Series) -> tuple[object, ...]:
        level = series.granularity if isinstance(series.granularity, int) else math.inf
        chooser = ("random", "auto", "all").index(series.granularity) if isinstance(series.granularity, str) else -1
        return models.index(series.model), PROTOCOLS.index(series.protocol), level, chooser, series.token_cost

    return {
        series: {benchmark: grouped[series][benchmark] for benchmark in BENCHMARKS if benchmark in grouped[series]}
        for series in sorted(grouped, key=order)
    }


def _identity(result: Result) -> tuple[str, str]:
    return result.model.fingerprint, result.model.dtype


def _model_names(results: Iterable[Result]) -> dict[tuple[str, str], str]:
    """A short name per model and data type: the end of its path, or more if two names would be equal."""
    candidates = {}
    for result in results:
        path, dtype, fingerprint = result.model.path, result.model.dtype, result.model.fingerprint[:8]
        short = "/".join(Path(path).parts[-2:])
        candidates[_identity(result)] = (short, path, f"{path} {dtype}", f"{path} {dtype} {fingerprint}")
    names: tuple[str, ...] = ()
    for names in zip(*candidates.values(), strict=True):
        if len(set(names)) == len(names):
            break
    return dict(zip(candidates, names, strict=True))
