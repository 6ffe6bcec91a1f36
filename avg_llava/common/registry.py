"""Registries of named implementations, from which a configuration field chooses one.

This module imports the standard library only, since files saved with a model's weights include it.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

EntryT = TypeVar("EntryT")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and says what to do."""


def find_entry(registry: Mapping[str, EntryT], name: str, field: str) -> EntryT:
    """The entry of a registry of named implementations that a configuration field chooses.

    Raises:
        ConfigError: No such entry; the message lists the known names and suggests the nearest.
    """
    if name not in registry:
        raise ConfigError(f"{field} must be one of {', '.join(registry)}; got {name!r}{suggest(name, registry)}")
    return registry[name]


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the nearest known one, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" - did you mean {matches[0]!r}?" if matches else ""
