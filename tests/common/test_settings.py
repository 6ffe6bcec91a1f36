"""Dataclasses from mappings: the types that results use beyond those of configurations."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from avg_llava.common.settings import ConfigError, apply_overrides, build, describe, read_yaml


@dataclass(frozen=True)
class Part:
    """A part."""

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


@dataclass(frozen=True)
class Settings:
    """Values of every type."""

    count: int = 1
    """Items,
    per step."""
    rate: float = 0.1
    name: str = "x"
    title: str | None = None
    switch: bool = False
    choice: Literal[1, 2] = 1
    names: tuple[str, ...] = ()
    part: Part | None = None
    parts: tuple[Part, ...] = ()


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("--count 2.0", "count", 2),
        ("--count 1e3", "count", 1000),
        ("--rate 1e-3", "rate", 1e-3),
        ("--rate=3", "rate", 3.0),
        ("--rate -2.5E+1", "rate", -25.0),
        ("--name 1e-3", "name", "1e-3"),
        ("--name null", "name", "null"),
        ("--name=a=b", "name", "a=b"),
        ("--title null", "title", None),
        ("--title true", "title", "true"),
        ("--title [draft", "title", "[draft"),
        ("--title #1", "title", "#1"),
        ("--name runs: @home", "name", "runs: @home"),
        ("--switch", "switch", True),
        ("--switch false", "switch", False),
        ("--choice 2", "choice", 2),
        ("--names [a,b]", "names", ("a", "b")),
        ("--part.size 3", "part", Part(3)),
        ("--part {size: 4}", "part", Part(4)),
        ("--parts [{size: 5}]", "parts", (Part(5),)),
    ],
)
def test_overrides_are_read_by_type(override, name, value):
    settings = build(Settings, apply_overrides({"part": None}, override.split(" ", 1), Settings))
    found = getattr(settings, name)
    assert (found, type(found)) == (value, type(value))


def test_a_date_in_a_file_is_text(tmp_path):
    (tmp_path / "settings.yaml").write_text("name: 2024-01-31\ntitle: 2024-01-31 10:00:00\n")
    settings = build(Settings, read_yaml(tmp_path / "settings.yaml"))
    assert (settings.name, settings.title) == ("2024-01-31", "2024-01-31 10:00:00")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": True}, r"count must be a whole number, got True \(bool\)"),
        ({"count": "1"}, r"count must be a whole number, got '1' \(str\)"),
        ({"count": 1.5}, "count must be a whole number, got 1.5"),
        ({"rate": "1"}, "rate must be a number, got '1'"),
        ({"rate": False}, "rate must be a number, got False"),
        ({"name": 1}, r"name must be text \(put quotes around it\), got 1"),
        ({"switch": 1}, "switch must be true or false, got 1"),
        ({"switch": "true"}, "switch must be true or false, got 'true'"),
        ({"choice": 3}, "choice must be one of 1, 2; got 3"),
        ({"choice": True}, "choice must not be true or false"),
        ({"choice": "1"}, "choice must be one of 1, 2; got '1'"),
        ({"names": "a"}, "names must be a list, got 'a'"),
        ({"names": [1]}, r"names\.0 must be text"),
        (
            {"part": {"sze": 1}},
            r"part\.size is missing: it has no default; unknown key part\.sze - did you mean 'size'",
        ),
        ({"parts": [{"size": 1}, 2]}, r"parts\.1 must be a mapping of size, got 2"),
        ({"cuont": 1, "rate": None}, r"rate must be a number, got None \(NoneType\); unknown key cuont - did you mean"),
    ],
)
def test_nothing_is_coerced(values, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        build(Settings, values)
    with pytest.raises(ConfigError, match=r"^entry 1\."):
        build(Settings, values, "entry 1")


def test_description_lists_keys_types_defaults_and_docstrings():
    assert list(describe(Settings, 40)) == [
        "  count: int = 1",
        "      Items, per step.",
        "  rate: float = 0.1",
        "  name: str = x",
        "  title: str|null = null",
        "  switch: bool = false",
        "  choice: 1|2 = 1",
        "  names: [str, ...] = []",
        "  part: section|null = null",
        "      A part.",
        "  part.size: int",
        "  parts: [section, ...] = []",
        "      A part.",
        "  parts[].size: int",
    ]
