"""Typed configuration: YAML files and `--key.subkey value` overrides into nested frozen dataclasses.

pydantic checks types strictly: a bool is no number, and text is neither. Every mistake is a `ConfigError` that names
the dotted path of the key: an unknown key with the nearest known one, a value of the wrong type with the expected type.
"""

import dataclasses
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import docstring_parser
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from avg_llava.common.registry import ConfigError, suggest

ConfigT = TypeVar("ConfigT")

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "string_type": "text (put quotes around it)",
    "tuple_type": "a list",
}
"""Names for users, by pydantic's type of error."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file that holds one mapping, merged over the file that its key `extends` names, if present.

    The path in `extends` is relative to the folder of the file that contains it, and may lead to a file that extends
    another. Sections are merged key by key; everything else, including lists, is replaced.
    """
    files = [Path(path)]
    values = _read_mapping(files[0])
    while (base := values.pop("extends", None)) is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{files[-1]}: extends must be the path of a YAML file, got {base!r}")
        files.append(files[-1].parent / base)
        if files[-1].resolve() in [file.resolve() for file in files[:-1]]:
            raise ConfigError(f"{' extends '.join(map(str, files))}: files that extend one another in a circle")
        values = _merge(_read_mapping(files[-1]), values)
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str], cls: type) -> dict[str, Any]:
    """Applies `--key.subkey value` (or `--key.subkey=value`) to the values of a file.

    A key without a value means true. Values are YAML (`null`, `[a, b]`, `{k: v}`); for a key that `cls` declares as
    text, they are taken literally.
    """
    merged = dict(values)
    remaining = list(overrides)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--") or len(argument) == 2:
            raise ConfigError(f"expected `--key.subkey value`, got {argument!r}")
        key, has_value, text = argument[2:].partition("=")
        if not has_value:
            text = remaining.pop(0) if remaining and not remaining[0].startswith("--") else "true"
        *sections, name = key.split(".")
        node = merged
        for depth, section in enumerate(sections):
            content = node.get(section)
            if not isinstance(content, Mapping | None):
                raise ConfigError(f"--{key}: {'.'.join(sections[: depth + 1])} is a value, not a section")
            node[section] = dict(content or {})  # the given values stay unchanged
            node = node[section]
        node[name] = _override_value(key, text, _locate(cls, key.split("."))[1])
    return merged


def with_list_from_file(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Replaces the value of a key `section.name`, if it is the path of a YAML file, by the list in that file."""
    section, name = key.split(".")
    options = values.get(section)
    if not isinstance(options, Mapping) or not isinstance(path := options.get(name), str):
        return dict(values)
    if not Path(path).is_file():
        raise ConfigError(f"{key}: {path} does not exist; name a YAML file that holds a list, or give the list")
    items = _read_file(Path(path))
    if not isinstance(items, list):
        raise ConfigError(f"{key}: {path} must hold a list, got {type(items).__name__}")
    return {**values, section: {**options, name: items}}


def build(cls: type[ConfigT], values: Mapping[str, Any], prefix: str = "") -> ConfigT:
    """Builds a dataclass from a mapping of YAML or JSON values, checking every key and type.

    Args:
        prefix: Dotted path of `values` inside the whole configuration, for messages.

    Raises:
        ConfigError: Unknown key, missing key, or value of the wrong type; the message lists all of them.
    """
    for path in _switches(values):
        # pydantic takes true for the literal 1.
        if any(typing.get_origin(choice) is typing.Literal for choice in _choices(_locate(cls, path)[1])):
            raise ConfigError(f"{'.'.join(filter(None, [prefix, *path]))} must not be true or false")
    try:
        # JSON, since strict validation of Python objects accepts neither dicts for dataclasses nor lists for tuples.
        return TypeAdapter(cls).validate_json(to_json(values), strict=True, extra="forbid")
    except ValidationError as error:
        messages: dict[str, list[str]] = {}  # by key: several if no type of a union fits
        for details in error.errors(include_url=False):
            key = ".".join(filter(None, [prefix, *_locate(cls, details["loc"])[0]]))
            messages.setdefault(key, []).append(_message(cls, key, details))
        raise ConfigError("; ".join("; or ".join(alternatives) for alternatives in messages.values())) from error


def describe(cls: type, width: int, prefix: str = "") -> Iterator[str]:
    """Lines of help, at most `width` wide, on every key of a configuration: path, type, default and docstring."""
    hints = typing.get_type_hints(cls)
    docs = {param.arg_name: param.description for param in docstring_parser.parse_from_object(cls).params}
    for field in dataclasses.fields(cls):
        key, expected = f"{prefix}{field.name}", hints[field.name]
        sections = [choice for choice in (expected, *typing.get_args(expected)) if _is_section(choice)]
        doc = docs.get(field.name) or (sections[0].__doc__ if sections else None) or ""
        yield f"  {key}: {_type_name(expected)}{_default_text(field)}"
        yield from textwrap.wrap(" ".join(doc.split()), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for section in sections:
            yield from describe(section, width, f"{key}[]." if typing.get_origin(expected) is tuple else f"{key}.")


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does: `1e-3` is a number, 2.0 is a whole one, and a date is text."""

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        value = self.construct_yaml_float(node)
        return int(value) if value.is_integer() else value

    def construct_date(self, node: yaml.ScalarNode) -> str:
        return self.construct_yaml_str(node)


_FLOAT = "tag:yaml.org,2002:float"
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_Loader.add_constructor(_FLOAT, _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_date)


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist")
    content = _read_file(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(content).__name__}")
    return content


def _read_file(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def _override_value(key: str, text: str, expected: Any) -> Any:
    choices = _choices(expected)
    if str in choices:
        return None if type(None) in choices and text.strip() in ("null", "~", "") else text
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: cannot read the value {text!r} ({error})") from error


def _merge(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in over.items():
        both_are_sections = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        merged[key] = _merge(values[key], value) if both_are_sections else value
    return merged


def _switches(values: Mapping[str, Any], *path: str) -> Iterator[tuple[str, ...]]:
    """Paths to all values true and false."""
    for key, value in values.items():
        if isinstance(value, bool):
            yield (*path, str(key))
        elif isinstance(value, Mapping):
            yield from _switches(value, *path, str(key))


def _is_section(expected: Any) -> bool:
    return isinstance(expected, type) and dataclasses.is_dataclass(expected)


def _choices(expected: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    is_union = typing.get_origin(expected) in (typing.Union, types.UnionType)
    return typing.get_args(expected) if is_union else (expected,)


def _locate(cls: type, path: Iterable[str | int]) -> tuple[list[str], Any]:
    """The keys along a path, and the declared type of the last one; None for an unknown key.

    After a key whose type is a union, pydantic's path names a type of the union; such an item is skipped.
    """
    keys: list[str] = []
    expected: Any = cls
    for item in path:
        choices = [choice for choice in _choices(expected) if choice is not type(None)]
        if len(choices) > 1:
            continue
        (container,) = choices
        if _is_section(container):
            expected = typing.get_type_hints(container).get(str(item))
        else:
            arguments = typing.get_args(container)
            expected = arguments[typing.get_origin(container) is dict] if arguments else None
        keys.append(str(item))
    return keys, expected


def _message(cls: type, key: str, details: Any) -> str:
    path, value = details["loc"], details["input"]
    match details["type"]:
        case "value_error":  # from `__post_init__`
            return str(details["ctx"]["error"])
        case "missing":
            return f"{key} is missing: it has no default"
        case "unexpected_keyword_argument":
            known_keys = _field_names(_locate(cls, path[:-1])[1])
            return f"unknown key {key}" + (suggest(path[-1], known_keys) or f"; known: {', '.join(known_keys)}")
        case "dataclass_type":
            names = ", ".join(_field_names(_locate(cls, path)[1]))
            return f"{key} must be a mapping of {names}, got {value!r} ({type(value).__name__})"
        case "literal_error":
            known = details["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
            hint = suggest(value, known.split(", ")) if isinstance(value, str) else ""
            return f"{key} must be one of {known}; got {value!r}{hint}"
        case "greater_than":
            return f"{key} must be above {details['ctx']['gt']:g}, got {value}"
        case "greater_than_equal":
            return f"{key} must be at least {details['ctx']['ge']:g}, got {value}"
        case kind:
            return f"{key} must be {_EXPECTED.get(kind, details['msg'])}, got {value!r} ({type(value).__name__})"


def _field_names(expected: Any) -> list[str]:
    return [field.name for choice in _choices(expected) if _is_section(choice) for field in dataclasses.fields(choice)]


def _type_name(expected: Any) -> str:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if len(_choices(expected)) > 1:
        return "|".join(map(_type_name, arguments))
    if origin is tuple:
        return f"[{_type_name(arguments[0])}, ...]"
    if origin is dict:
        return f"{{{_type_name(arguments[0])}: {_type_name(arguments[1])}}}"
    if _is_section(expected):
        return "section"
    return "null" if expected is type(None) else expected.__name__


def _default_text(field: "dataclasses.Field[Any]") -> str:
    if field.default is field.default_factory is dataclasses.MISSING:
        return ""
    default = field.default if field.default is not dataclasses.MISSING else {}  # a section's defaults are listed below
    text = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
    return f" = {text.splitlines()[0]}"
