"""Published figures: the paper's tables, and what a benchmark is expected to give.

`published.json` holds tables 1 to 4 with the source of every row, and notes on figures that are not what they are
called. `eval/expected/<benchmark>.json` holds the figures of AVG-LLaVA with a tolerance. Shares are in
percent, MME is in points.
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


@dataclass(frozen=True)
class Column:
    """A column of a table: one metric of one benchmark."""

    label: str
    benchmark: str
    metric: str


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table; `values` are in the columns' order, null where nothing was published."""

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
    """What the paper says about figure 5, which has no numbers: these benchmarks go to these levels (by index)."""

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
    """A measured figure beside an expected one."""

    expected: Expected
    measured: float

    @property
    def agrees(self) -> bool:
        """Whether the two are within the tolerance."""
        return (
            abs(self.measured - self.expected.published) <= self.expected.tolerance + 1e-9
        )  # a figure on the edge is within


@cache
def load_published() -> Published:
    """The paper's tables."""
    text = files("avg_llava.evaluation").joinpath("published.json").read_text(encoding="utf-8")
    return build(Published, json.loads(text))


def score_columns() -> tuple[Column, ...]:
    """The columns of tables 1 and 2: all metrics that are reported."""
    tables = load_published().tables
    return tables["1"].columns + tables["2"].columns


def in_table_units(value: float, kind: str, maximum: float) -> float:
    """A metric's value as tables give it: points where strata are added up (MME), else percent of the maximum."""
    return value if kind == "stratum_sum" else 100 * value / maximum


def load_expected(check: Path, names: Sequence[str]) -> list[Expected]:
    """Expected figures: those of a file, or the published ones of the named benchmarks if `check` is `published`.

    Raises:
        ResultError: The file holds no expected figures.
    """
    if str(check) == "published":
        return [figure for name in names for figure in BENCHMARKS[name].expected]
    return read_expected(check)


def read_expected(path: Path) -> list[Expected]:
    """Reads a JSON file with a list of expected figures, such as `eval/expected/sample.json`.

    Raises:
        ResultError: If the file is none of these.
    """
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise ResultError(f"{path} must hold a list of expected figures")
    try:
        return [build(Expected, entry, str(index)) for index, entry in enumerate(content)]
    except ConfigError as error:
        raise ResultError(f"{path}: {error}") from error


def compare_with_expected(result: Result, expected: list[Expected]) -> list[Comparison]:
    """The result's figures beside those expected of its benchmark and protocol.

    Raises:
        ResultError: If an expected metric was not measured, or what is expected is of other benchmarks or protocols.
    """
    compared = []
    for entry in expected:
        if (entry.benchmark, entry.protocol) != (result.benchmark, result.protocol):
            continue
        metric = result.metrics.get(entry.metric)
        if metric is None:
            raise ResultError(f"{result.benchmark} has no metric {entry.metric}; it has {', '.join(result.metrics)}")
        compared.append(Comparison(entry, in_table_units(metric.value, metric.kind, metric.maximum)))
    if expected and not compared:
        raise ResultError(
            f"nothing is expected of {result.benchmark} by the protocol {result.protocol}: there are figures of "
            f"{', '.join(sorted({f'{entry.benchmark} ({entry.protocol})' for entry in expected}))}"
        )
    return compared
