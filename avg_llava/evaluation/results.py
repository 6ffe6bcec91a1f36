"""The result of one benchmark in one setting, written by `avg-llava evaluate` and read by `avg-llava report`.

A result is a JSON file. It holds the score of every unit (a question, an image pair), not only their mean, so that
confidence intervals and paired tests need no other file. The answers are in a JSON-lines file beside it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import FiniteFloat

from avg_llava.common.files import write_json
from avg_llava.common.registry import find_entry
from avg_llava.common.settings import ConfigError, build
from avg_llava.evaluation.benchmarks import BENCHMARKS, Protocol
from avg_llava.evaluation.statistics import Metric, UnitError, compute_value

FORMAT = 1
VALUE_TOLERANCE = 1e-3
"""Relative to the maximum; some harnesses round to three decimals."""

Granularity = Literal["auto", "random", "all"] | int


class ResultError(ValueError):
    """A result file is invalid; the message names the file and the field."""


@dataclass(frozen=True)
class ModelFacts:
    """The model that answered."""

    path: str
    fingerprint: str
    dtype: str
    granularities: tuple[int, ...]
    """Visual tokens per crop at each level, coarse to fine."""
    ablation: Literal["c", "e", "f", "g"] | None = None
    """The training ablation, by its letter in the paper's table 4; null if there is none. The other letters (a, b, d)
    follow from the setting and the levels."""


@dataclass(frozen=True)
class DatasetFacts:
    """The questions."""

    path: str
    config: str | None
    split: str
    num_questions: int
    fingerprint: str


@dataclass(frozen=True)
class HarnessFacts:
    """The code that made the prompts and the scores."""

    name: str
    version: str
    task: str


@dataclass(frozen=True)
class GenerationFacts:
    """Options of generation, which is always greedy."""

    max_new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class Failure:
    """A question without an answer."""

    id: str
    error: str


@dataclass(frozen=True)
class Spread:
    """Median and mean over questions."""

    median: FiniteFloat
    mean: FiniteFloat


@dataclass(frozen=True)
class Speed:
    """Median seconds per question on the same questions, answered in turn (the paper's table 3)."""

    num_questions: int
    routed_seconds: FiniteFloat
    finest_seconds: FiniteFloat
    llava_next_seconds: FiniteFloat
    """transformers' LLaVA-NeXT."""
    speedup_over_finest: FiniteFloat
    speedup_over_llava_next: FiniteFloat


@dataclass(frozen=True)
class Efficiency:
    """Tokens and times, measured while answering; means are over questions."""

    mean_visual_tokens: FiniteFloat
    token_share: FiniteFloat
    """Visual tokens relative to the finest level."""
    grid_share: FiniteFloat
    """Tokens per crop relative to the finest level: "token per grid" in the paper's table 3."""
    time_to_first_token_ms: Spread
    seconds_per_question: Spread
    router_share: FiniteFloat | None
    """The router's share of the time; null if it did not run."""
    speed: Speed | None


@dataclass(frozen=True)
class Oracle:
    """Headline score if each question is answered at its best level."""

    value: FiniteFloat
    regret: FiniteFloat
    """The oracle's value minus the router's."""
    agreement: FiniteFloat
    """Share of questions that the router sent to the oracle's level."""
    mean_visual_tokens: FiniteFloat


@dataclass(frozen=True)
class CurvePoint:
    """Headline score and tokens of the router at one price."""

    token_cost: FiniteFloat
    value: FiniteFloat
    token_share: FiniteFloat
    mean_visual_tokens: FiniteFloat


@dataclass(frozen=True)
class Routing:
    """The levels of the images."""

    levels: dict[str, FiniteFloat]
    """Tokens per crop -> share of the images (figure 5); empty if there was no image."""
    oracle: Oracle | None
    curve: tuple[CurvePoint, ...] | None


@dataclass(frozen=True)
class Result:
    """The result of one benchmark, protocol and setting. The fields are those of the file."""

    format: int
    benchmark: str
    protocol: Protocol
    model: ModelFacts
    granularity: Granularity
    """How levels were chosen: by the router (`auto`), at random, or forced (tokens per crop). `all`: by the router, and
    every level was answered too, for the oracle and the curve."""
    token_cost: FiniteFloat
    dataset: DatasetFacts
    harness: HarnessFacts
    generation: GenerationFacts
    prompt: str
    """The prompt of the first question."""
    complete: bool
    num_failed: int
    failures: tuple[Failure, ...]
    metrics: dict[str, Metric]
    """The first is the headline."""
    efficiency: Efficiency
    routing: Routing
    machine: dict[str, Any]
    answers: str
    """Name of the file of answers beside this one."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def headline(self) -> Metric:
        """The benchmark's first metric."""
        return next(iter(self.metrics.values()))


def parse_result(content: Any, source: str) -> Result:
    """Makes a result from the content of the file `source`.

    Raises:
        ResultError: A field is missing, unknown, of the wrong type or contradicts another.
    """
    if not isinstance(content, Mapping):
        raise ResultError(f"{source} holds {type(content).__name__}, not a result of `avg-llava evaluate`")
    if content.get("format") != FORMAT:
        raise ResultError(
            f"{source}: format is {content.get('format')!r}, and this version reads {FORMAT}; "
            "it is no result of `avg-llava evaluate`, or of another version: evaluate again"
        )
    try:
        return build(Result, content)
    except ConfigError as error:
        raise ResultError(f"{source}: {error}") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ResultError: There is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ResultError(f"{path} is no file; name the JSON file of a result") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path} is not valid JSON ({error}); was it cut short? evaluate again") from error


def write_result(result: Result, path: Path) -> None:
    """Writes a result file atomically."""
    write_json(path, dataclasses.asdict(result), indent=1, ensure_ascii=False, allow_nan=False)


# ---- consistency of a result --------------------------------------------------------------------------------------


def _check(result: Result) -> None:
    find_entry(BENCHMARKS, result.benchmark, "benchmark")
    if not result.metrics:
        raise ResultError("metrics is empty: there is no score")
    for name, metric in result.metrics.items():
        _check_metric(f"metrics.{name}", metric)
    if result.dataset.num_questions < 1:
        raise ResultError("dataset.num_questions must be at least 1")
    if result.num_failed < len(result.failures):
        raise ResultError(f"num_failed is {result.num_failed}, but failures names {len(result.failures)}")
    if result.token_cost < 0:
        raise ResultError(f"token_cost is a price and cannot be {result.token_cost:g}")
    levels = result.model.granularities
    if not levels or list(levels) != sorted(set(levels)):
        raise ResultError(f"model.granularities must go from coarse to fine, got {list(levels)}")
    if isinstance(result.granularity, int) and result.granularity not in levels:
        raise ResultError(f"granularity {result.granularity} is none of the model's levels {list(levels)}")
    shares = result.routing.levels
    unknown = [name for name in shares if name not in map(str, levels)]
    if unknown:
        raise ResultError(f"routing.levels: {unknown[0]!r} is none of the model's levels {list(levels)}")
    if shares and not (min(shares.values()) >= 0 and math.isclose(sum(shares.values()), 1, abs_tol=1e-3)):
        raise ResultError(f"routing.levels: shares must be 0 or more and add up to 1, got {sum(shares.values()):g}")


def _check_metric(field: str, metric: Metric) -> None:
    if metric.maximum <= 0:
        raise ResultError(f"{field}.maximum must be above 0, got {metric.maximum:g}")
    try:
        computed = compute_value(metric.kind, metric.units)
    except UnitError as error:
        raise ResultError(f"{field}.units: {error}") from error
    if abs(computed - metric.value) > VALUE_TOLERANCE * metric.maximum:
        raise ResultError(
            f"{field}.value is {metric.value:g}, but its units give {computed:g}; the file was changed after it was "
            "written, or evaluate did not write it"
        )
    if not 0 <= metric.value <= metric.maximum * (1 + 1e-9):
        raise ResultError(f"{field}.value {metric.value:g} is not between 0 and the maximum {metric.maximum:g}")
