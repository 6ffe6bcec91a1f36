"""Dataclasses from mappings: the types that results use beyond those of configurations."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from avg_llava.common.settings import ConfigError, build


@dataclass(frozen=True)
class Part:
    size: int


@dataclass(frozen=True)
class Whole:
    parts: dict[str, Part]
    level: Literal["auto"] | int
    anything: Any = None
    maybe: Literal["auto"] | int | None = None


def test_mappings_unions_and_anything():
    whole = build(Whole, {"parts": {"a": {"size": 1}, 2: {"size": 3}}, "level": 7, "anything": [{"x": None}]})
    assert whole == Whole({"a": Part(1), "2": Part(3)}, 7, [{"x": None}])
    assert build(Whole, {"parts": {}, "level": "auto", "maybe": None}) == Whole({}, "auto")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": [1], "level": 1}, "parts must be a mapping, got"),
        ({"parts": {"a": {"size": "x"}}, "level": 1}, r"parts\.a\.size must be a whole number"),
        ({"parts": {}, "level": 1.5}, "level must be one of auto; got 1.5.*; or level must be a whole number, got 1.5"),
        ({"parts": {}, "level": None}, "level must be one of auto; got None"),
    ],
)
def test_mistakes_are_named_by_their_path(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Whole, values)
