"""Metrics, confidence intervals and paired tests from the units that a metric is computed from.

Legend: U units, K cells, R resamples.

A unit is resampled as a whole in a bootstrap: a question, MMBench's base question, an image pair of MME. Units that
contribute the same to the score are interchangeable, so they are counted in K cells, and every metric is a function of
the cells' counts. Resampling U units with replacement is one multinomial sample of counts: the exact bootstrap, which
needs little memory.

Sources: percentile bootstrap, Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Paired test by
approximate randomisation, Noreen, Computer-Intensive Methods for Testing Hypotheses (1989), applied to F1 by Yeh (2000,
arXiv cs/0008005). The p value counts the observed difference among the random ones: Davison and Hinkley, Bootstrap
Methods and their Application (1997), section 4.2.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import FiniteFloat

MetricKind = Literal["mean", "stratum_sum", "f1", "precision", "recall"]

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
CHUNK = 2**21
"""Numbers kept in memory at a time."""

_OUTCOMES = ("tp", "fp", "fn", "tn", "other")
FloatArray = NDArray[np.float64]
CountArray = NDArray[np.int64]


class UnitError(ValueError):
    """A unit does not fit the kind of its metric; the message names it."""


@dataclass(frozen=True)
class Metric:
    """A score with the units it is computed from.

    `units` maps a unit's id to its contribution, whose form depends on `kind` (see `compute_value`).
    """

    value: FiniteFloat
    kind: MetricKind
    maximum: FiniteFloat
    """The highest possible value."""
    label: str
    """Name in tables, such as `accuracy`."""
    units: dict[str, Any]


@dataclass(frozen=True)
class PairedTest:
    """The comparison of two runs on the units that both have.

    Attributes:
        difference: The first run's value minus the second's.
        low: Lower end of the difference's confidence interval (paired percentile bootstrap).
        high: Upper end.
        p_value: Two-sided, of the hypothesis that the runs' scores of a unit are exchangeable (approximate
            randomisation).
        num_left_out: Units that only one run has.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_units: int
    num_left_out: int


def compute_value(kind: MetricKind, units: Mapping[str, Any]) -> float:
    """Computes the value of a metric.

    Args:
        kind: `mean`: a unit is a number, the value is their mean. `stratum_sum`: a unit is [number, stratum], the value
            is the sum over strata of the stratum's mean (MME: image pairs, categories). `f1`, `precision`, `recall`: a
            unit is `tp`, `fp`, `fn`, `tn` or `other`, which is ignored; 0 / 0 is taken as 0.
        units: Unit id -> unit.

    Raises:
        UnitError: There is no unit, or one of another kind.
    """
    cells = _count(_parse(kind, units).values())
    return float(_evaluate(kind, cells.counts[None], cells.strata, cells.values[:, 0])[0])


def bootstrap_interval(
    kind: MetricKind, units: Mapping[str, Any], seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """Computes the ends of the 95% percentile bootstrap interval of a metric, resampling within strata."""
    cells = _count(_parse(kind, units).values())
    rng = np.random.default_rng(seed)
    values = [
        _evaluate(kind, counts, cells.strata, cells.values[:, 0])
        for counts in _in_chunks(lambda rows: _resample(rng, cells, rows), num_resamples, len(cells.counts))
    ]
    return _percentiles(np.concatenate(values))


def paired_test(
    kind: MetricKind,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> PairedTest:
    """Tests the difference of two runs on the units that both have.

    The smallest possible p value is 1 / (R + 1) with R resamples.

    Raises:
        UnitError: They have no unit in common, or a unit is of different strata.
    """
    parsed = _parse(kind, first), _parse(kind, second)
    common = [name for name in parsed[0] if name in parsed[1]]
    if not common:
        raise UnitError("the two runs have no unit in common, so they answered different questions")
    rows = []
    for name in common:
        (stratum, one), (other_stratum, two) = parsed[0][name], parsed[1][name]
        if stratum != other_stratum:
            raise UnitError(f"unit {name!r} is of {stratum!r} in one run and of {other_stratum!r} in the other")
        rows.append((stratum, one, two))
    cells = _count(rows)
    one, two = cells.values.T
    rng = np.random.default_rng(seed)

    def difference(counts: CountArray) -> FloatArray:
        return _evaluate(kind, counts, cells.strata, one) - _evaluate(kind, counts, cells.strata, two)

    def difference_exchanged(exchanged: CountArray) -> FloatArray:
        """The difference if `exchanged` units (R, K) of each cell have their two scores exchanged."""
        counts = np.concatenate([cells.counts - exchanged, exchanged], axis=1)
        strata = np.concatenate([cells.strata, cells.strata])
        kept, other = np.concatenate([one, two]), np.concatenate([two, one])
        return _evaluate(kind, counts, strata, kept) - _evaluate(kind, counts, strata, other)

    num_cells = len(cells.counts)
    observed = float(difference(cells.counts[None])[0])
    resampled = [
        difference(counts) for counts in _in_chunks(lambda rows: _resample(rng, cells, rows), num_resamples, num_cells)
    ]
    num_as_far = sum(
        int(np.sum(np.abs(difference_exchanged(exchanged)) >= abs(observed) - 1e-9))
        for exchanged in _in_chunks(
            lambda rows: rng.binomial(cells.counts, 0.5, size=(rows, num_cells)), num_resamples, num_cells
        )
    )
    low, high = _percentiles(np.concatenate(resampled))
    return PairedTest(
        difference=observed,
        low=low,
        high=high,
        p_value=(1 + num_as_far) / (1 + num_resamples),
        num_units=len(common),
        num_left_out=len(first) + len(second) - 2 * len(common),
    )


# ---- cells --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cells:
    """Counts of interchangeable units: `counts` (K,), `strata` (K,) as indices, `values` (K, 1 or 2)."""

    counts: CountArray
    strata: CountArray
    values: FloatArray


def _parse(kind: MetricKind, units: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """Parses units: id -> (stratum, number); an outcome becomes its index in `_OUTCOMES`."""
    if not units:
        raise UnitError("there is none, so there is nothing to compute")
    return {name: _parse_unit(kind, name, unit) for name, unit in units.items()}


def _parse_unit(kind: MetricKind, name: str, unit: Any) -> tuple[str, float]:
    if kind == "mean":
        return "", _number(name, unit)
    if kind == "stratum_sum":
        if not isinstance(unit, list | tuple) or len(unit) != 2 or not isinstance(unit[1], str):
            raise UnitError(f"unit {name!r} must be [number, stratum], got {unit!r}")
        return unit[1], _number(name, unit[0])
    if unit not in _OUTCOMES:
        raise UnitError(f"unit {name!r} must be one of {', '.join(_OUTCOMES)}, got {unit!r}")
    return "", float(_OUTCOMES.index(unit))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise UnitError(f"unit {name!r} must be a finite number, got {value!r}")
    return float(value)


def _count(rows: Collection[tuple[Any, ...]]) -> _Cells:
    """Counts rows (stratum, number, ...) in cells; the result does not depend on the order of rows."""
    counted = sorted(Counter(rows).items())
    index = {stratum: position for position, stratum in enumerate(sorted({row[0] for row in rows}))}
    return _Cells(
        counts=np.array([count for _, count in counted], dtype=np.int64),
        strata=np.array([index[row[0]] for row, _ in counted], dtype=np.int64),
        values=np.array([row[1:] for row, _ in counted], dtype=np.float64),
    )


def _evaluate(kind: MetricKind, counts: CountArray, strata: CountArray, values: FloatArray) -> FloatArray:
    """Computes the metric of every row of counts: (R, K), (K,), (K,) -> (R,)."""
    if kind in ("mean", "stratum_sum"):
        total = np.zeros(len(counts))
        for stratum in np.unique(strata):
            inside = strata == stratum
            total += counts[:, inside] @ values[inside] / counts[:, inside].sum(axis=1)
        return total
    positive, false_positive, false_negative = (
        counts[:, values == _OUTCOMES.index(outcome)].sum(axis=1) for outcome in ("tp", "fp", "fn")
    )
    wrong = {
        "precision": false_positive,
        "recall": false_negative,
        "f1": (false_positive + false_negative) / 2,  # 2PR / (P + R) in terms of counts
    }[kind]
    return positive / np.where(positive > 0, positive + wrong, 1)


def _resample(rng: np.random.Generator, cells: _Cells, num_rows: int) -> CountArray:
    """Samples units with replacement within each stratum; returns their counts (R, K)."""
    sampled = np.empty((num_rows, len(cells.counts)), dtype=np.int64)
    for stratum in np.unique(cells.strata):
        inside = cells.strata == stratum
        size = cells.counts[inside].sum()
        sampled[:, inside] = rng.multinomial(size, cells.counts[inside] / size, size=num_rows)
    return sampled


def _in_chunks(sample: Callable[[int], CountArray], num_rows: int, num_cells: int) -> Iterator[CountArray]:
    """Yields `num_rows` rows from `sample`, in chunks of limited memory."""
    largest = max(1, CHUNK // num_cells)
    for start in range(0, num_rows, largest):
        yield sample(min(largest, num_rows - start))


def _percentiles(values: FloatArray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
