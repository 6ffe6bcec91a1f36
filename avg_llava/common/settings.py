"""Typed configuration from YAML: a mapping and `--key.subkey value` overrides into nested frozen dataclasses.

Nothing here knows about training. Every mistake is a `ConfigError` that names the key: an unknown key with the
nearest known one, a value of the wrong type with the type that was expected.
"""

import dataclasses
import difflib
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import docstring_parser
import yaml

ConfigT = TypeVar("ConfigT")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and says what to do."""


@dataclass(frozen=True)
class RawValue:
    """The text of a command-line override: what it means depends on the type of the key it is for."""

    text: str

    def parse(self, key: str) -> Any:
        try:
            return yaml.safe_load(self.text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: cannot read the value {self.text!r} ({error})") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping, over the file that its key `extends` names, if it has one.

    That file's path is relative to the folder of the one that names it, and it may extend a third. Sections are merged
    key by key; everything else, lists too, is replaced.
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


def _merge(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in over.items():
        both_are_sections = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        merged[key] = _merge(values[key], value) if both_are_sections else value
    return merged


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist")
    content = _read_file(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(content).__name__}")
    return content


def _read_file(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Put `--key.subkey value` (or `--key.subkey=value`) over the values of a file.

    A key without a value means `true`, so that switches read as such. Values are YAML: `null`, `[a, b]`, `{k: v}`.
    """
    merged = _copy_mappings(values)
    position = 0
    while position < len(overrides):
        argument = overrides[position]
        position += 1
        if not argument.startswith("--") or len(argument) == 2:
            raise ConfigError(f"expected `--key.subkey value`, got {argument!r}")
        key, has_value, text = argument[2:].partition("=")
        if not has_value:
            if position < len(overrides) and not overrides[position].startswith("--"):
                text = overrides[position]
                position += 1
            else:
                text = "true"
        _set_dotted(merged, key, RawValue(text))
    return merged


def with_list_from_file(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Put the list that a YAML file holds in the place of the file's path, where the value of a dotted key is one."""
    merged = _copy_mappings(values)
    *sections, name = key.split(".")
    node = merged
    for section in sections:
        node = node.get(section, {})
        if not isinstance(node, dict):
            return merged  # a mistake that `build` names
    value = node.get(name)
    path = value.parse(key) if isinstance(value, RawValue) else value
    if isinstance(path, str):
        if not Path(path).is_file():
            raise ConfigError(f"{key}: {path} does not exist; name a YAML file that holds a list, or give the list")
        node[name] = _read_file(Path(path))
        if not isinstance(node[name], list):
            raise ConfigError(f"{key}: {path} must hold a list, got {type(node[name]).__name__}")
    return merged


def build(cls: type[ConfigT], values: Mapping[str, Any], prefix: str = "") -> ConfigT:
    """Build the dataclass `cls` from `values`, checking every key and type.

    Args:
        cls: a dataclass whose fields are int, float, str, bool, Any, Literal, dataclasses, tuples of or mappings to one
            such type, or a union of these; of the types of a union, the first that fits is taken.
        values: the mapping, as YAML gives it; leaves may be `RawValue`.
        prefix: dotted path of `values` inside the whole configuration, for messages.

    Raises:
        ConfigError: unknown key, missing key or value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ConfigError(f"unknown key {_join(prefix, str(name))}{_nearest(str(name), fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], _join(prefix, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(prefix, name)} is missing: it has no default")
    return cls(**arguments)


def _convert(expected: Any, value: Any, key: str) -> Any:
    """`value` as the type `expected`, or a ConfigError that names `key`."""
    origin, choices = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        is_null = value is None or (isinstance(value, RawValue) and value.text.strip() in ("null", "~", ""))
        if is_null and type(None) in choices:
            return None
        return _convert_first([choice for choice in choices if choice is not type(None)], value, key)
    if isinstance(value, RawValue):
        value = value.text if expected is str else value.parse(key)
    if expected is Any:
        return value
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            raise _wrong_type(key, "a mapping of " + ", ".join(f.name for f in dataclasses.fields(expected)), value)
        return build(typing.cast(type, expected), value, key)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong_type(key, "a list", value)
        return tuple(_convert(choices[0], item, f"{key}.{index}") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong_type(key, "a mapping", value)
        return {str(name): _convert(choices[1], item, _join(key, str(name))) for name, item in value.items()}
    if origin is typing.Literal:
        if value not in choices or isinstance(value, bool):
            hint = _nearest(str(value), [str(choice) for choice in choices])
            raise ConfigError(f"{key} must be one of {', '.join(map(str, choices))}; got {value!r}{hint}")
        return value
    return _convert_scalar(expected, value, key)


def _convert_first(types_: Sequence[Any], value: Any, key: str) -> Any:
    """`value` as the first of several types that fits."""
    messages = []
    for expected in types_:
        try:
            return _convert(expected, value, key)
        except ConfigError as error:
            messages.append(str(error))
    raise ConfigError("; or ".join(messages))


def _convert_scalar(expected: Any, value: Any, key: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if expected is float:
        # YAML 1.1 reads `1e-3` (no dot) as text, and every learning rate is written that way.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                raise _wrong_type(key, "a number", value) from None
        if is_number:
            return float(value)
        raise _wrong_type(key, "a number", value)
    if expected is int:
        if is_number and float(value).is_integer():
            return int(value)
        raise _wrong_type(key, "a whole number", value)
    if expected is bool:
        if isinstance(value, bool):
            return value
        raise _wrong_type(key, "true or false", value)
    if expected is str:
        if isinstance(value, str):
            return value
        raise _wrong_type(key, "text (put quotes around it)", value)
    raise AssertionError(f"{key}: fields of type {expected} are not supported")


def describe(cls: type, width: int, prefix: str = "") -> Iterator[str]:
    """Lines of help, at most `width` wide, on every key of a configuration: path, type, default and docstring."""
    hints = typing.get_type_hints(cls)
    docs = {param.arg_name: param.description for param in docstring_parser.parse_from_object(cls).params}
    for field in dataclasses.fields(cls):
        key, expected = _join(prefix, field.name), hints[field.name]
        choices: tuple[Any, ...] = (expected, *typing.get_args(expected))
        sections = [choice for choice in choices if isinstance(choice, type) and dataclasses.is_dataclass(choice)]
        doc = docs.get(field.name) or (sections[0].__doc__ if sections else None) or ""
        yield f"  {key}: {_type_name(expected)}{_default_text(field)}"
        yield from textwrap.wrap(" ".join(doc.split()), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for section in sections:
            yield from describe(section, width, f"{key}[]" if typing.get_origin(expected) is tuple else key)


def _default_text(field: dataclasses.Field) -> str:
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    if default is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING else " = {}"
    return f" = {yaml.safe_dump(default, default_flow_style=True).splitlines()[0]}"


def _set_dotted(values: dict[str, Any], key: str, value: RawValue) -> None:
    *sections, name = key.split(".")
    node = values
    for depth, section in enumerate(sections):
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--{key}: {'.'.join(sections[: depth + 1])} is a value, not a section")
        node = child
    node[name] = value


def _copy_mappings(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy_mappings(item) if isinstance(item, Mapping) else item for key, item in values.items()}


def _wrong_type(key: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{key} must be {expected}, got {value!r} ({type(value).__name__})")


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" - did you mean {matches[0]!r}?" if matches else f"; known: {', '.join(known)}"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _type_name(expected: Any) -> str:
    origin, choices = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Literal:
        return "|".join(map(str, choices))
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type_name(choice) for choice in choices)
    if origin is tuple:
        return f"[{_type_name(choices[0])}, ...]"
    if origin is dict:
        return f"{{{_type_name(choices[0])}: {_type_name(choices[1])}}}"
    if dataclasses.is_dataclass(expected):
        return "section"
    return "null" if expected is type(None) else expected.__name__
