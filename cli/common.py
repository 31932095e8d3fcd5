"""A config from what files say, and from what was typed over it."""

from typing import Any, TypeVar

import draccus

from sae.base.errors import ConfigError
from sae.base.settings import decode, describe, merge, parse_value, set_dotted

T = TypeVar("T")


def read_config(kind: type[T], said: dict[str, Any], overrides: list[str], defaults: T | None = None) -> T:
    """Returns defaults, what files say, then overrides ("--coder.selection.k 64" or "--coder.selection.k=64")."""
    data = merge(draccus.encode(defaults or kind()), said)
    for key, value in _pairs(overrides):
        set_dotted(data, key, parse_value(kind, key, value))
    return decode(kind, data)


def _pairs(overrides: list[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(overrides)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r}: expected --field value (see --help-fields)")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key}: its value is missing")
            value = rest.pop(0)
        pairs.append((key.replace("-", "_"), value))
    return pairs


def field_help(kind: type[Any]) -> str:
    """Returns one paragraph per config field: name, default, meaning."""
    return "\n".join(f"  --{name}  (default: {default})\n      {doc}" for name, default, doc in describe(kind))
