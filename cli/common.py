"""A config from what files say, and from what was typed over it."""

from typing import Any, TypeVar

import draccus

from sae.base.settings import decode, merge, parse_value, set_dotted

from .typed import pairs

T = TypeVar("T")


def read_config(kind: type[T], said: dict[str, Any], overrides: list[str], defaults: T | None = None) -> T:
    """Returns defaults, what files say, then overrides ("--coder.selection.k 64" or "--coder.selection.k=64")."""
    data = merge(draccus.encode(defaults or kind()), said)
    for key, value in pairs(overrides):
        set_dotted(data, key, parse_value(kind, key, value))
    return decode(kind, data)
