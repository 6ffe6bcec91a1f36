"""Registries: dictionaries of named implementations, one of which a configuration field chooses."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from avg_llava.common.settings import ConfigError

EntryT = TypeVar("EntryT")


def find_entry(registry: Mapping[str, EntryT], name: str, field: str) -> EntryT:
    """The entry of `registry` called `name`.

    Args:
        registry: Implementations by name.
        name: Value of the configuration field.
        field: The configuration field, for the error message.

    Raises:
        ConfigError: No such entry; the message lists the known names and suggests the nearest.
    """
    if name not in registry:
        matches = difflib.get_close_matches(name, registry, n=1, cutoff=0.5)
        suggestion = f" - did you mean {matches[0]!r}?" if matches else ""
        raise ConfigError(f"{field} must be one of {', '.join(registry)}; got {name!r}{suggestion}")
    return registry[name]
