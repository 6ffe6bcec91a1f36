"""The paper's tables, and the comparison of measured figures with expected ones.

`published.json` holds tables 1 to 4 with the source of every row, and notes on figures whose name is misleading.
Each benchmark's file holds the figures of AVG-LLaVA with a tolerance. Shares are in percent, MME is in points.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from avg_llava.common.settings import ConfigError, build
from avg_llava.evaluation.benchmarks import BENCHMARKS, Expected
from avg_llava.evaluation.results import Result, ResultError, read_json
from avg_llava.evaluation.statistics import Metric


@dataclass(frozen=True)
class Column:
    """A column of a table: one metric of one benchmark."""

    label: str
    benchmark: str
    metric: str


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table; `values` are in the columns' order, null if unpublished."""

    name: str
    key: str | None
    """Table 3: the quantity, one of `tables.QUANTITIES`. Table 4: the letter of the ablation, or `full`."""
    source: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class PublishedTable:
    """One table of the paper."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[PublishedRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RoutingStatement:
    """A statement about figure 5, which has no numbers: the router sends these benchmarks to these level indices."""

    statement: str
    benchmarks: tuple[str, ...]
    levels: tuple[int, ...]


@dataclass(frozen=True)
class Published:
    """Contents of `published.json`."""

    source: str
    tables: dict[str, PublishedTable]
    routing: tuple[RoutingStatement, ...]


@dataclass(frozen=True)
class Comparison:
    """A measured figure and the expected one."""

    expected: Expected
    measured: float

    @property
    def agrees(self) -> bool:
        """True if the difference is at most the tolerance."""
        return abs(self.measured - self.expected.published) <= self.expected.tolerance + 1e-9  # rounding


@cache
def load_published() -> Published:
    """Reads the paper's tables."""
    text = files("avg_llava.evaluation").joinpath("published.json").read_text(encoding="utf-8")
    return build(Published, json.loads(text))


def score_columns() -> tuple[Column, ...]:
    """The columns of tables 1 and 2, that is, every metric the paper reports."""
    tables = load_published().tables
    return tables["1"].columns + tables["2"].columns


def in_table_units(metric: Metric, value: float) -> float:
    """Converts a metric's value to the unit of tables: points for sums of strata (MME), else percent of the maximum."""
    return value if metric.kind == "stratum_sum" else 100 * value / metric.maximum


def load_expected(check: Path, names: Sequence[str]) -> list[Expected]:
    """Loads expected figures of a JSON file, such as `eval/expected/sample.json`.

    If `check` is `published`, they are the published ones of the named benchmarks.

    Raises:
        ResultError: The file is missing, not JSON, or no list of expected figures.
    """
    if str(check) == "published":
        return [figure for name in names for figure in BENCHMARKS[name].expected]
    content = read_json(check)
    if not isinstance(content, list) or not content:
        raise ResultError(f"{check} must hold a list of expected figures")
    try:
        return [build(Expected, entry, str(index)) for index, entry in enumerate(content)]
    except ConfigError as error:
        raise ResultError(f"{check}: {error}") from error


def compare_with_expected(result: Result, expected: list[Expected]) -> list[Comparison]:
    """Compares a result with the figures expected of its benchmark and protocol.

    Raises:
        ResultError: An expected metric was not measured, or all figures are of other benchmarks or protocols.
    """
    compared = []
    for entry in expected:
        if (entry.benchmark, entry.protocol) != (result.benchmark, result.protocol):
            continue
        metric = result.metrics.get(entry.metric)
        if metric is None:
            raise ResultError(f"{result.benchmark} has no metric {entry.metric}; it has {', '.join(result.metrics)}")
        compared.append(Comparison(entry, in_table_units(metric, metric.value)))
    if expected and not compared:
        raise ResultError(
            f"nothing is expected of {result.benchmark} by the protocol {result.protocol}: there are figures of "
            f"{', '.join(sorted({f'{entry.benchmark} ({entry.protocol})' for entry in expected}))}"
        )
    return compared
