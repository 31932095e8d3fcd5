"""What is known of a coder beside its files: said by the user and checked here, or by the table of releases."""

import math
from dataclasses import replace
from typing import Any

from sae.base.errors import ConfigError, nearest
from sae.loading.releases import Release, release_at
from sae.untrusted.hints import Hints
from sae.untrusted.places import Place

__all__ = ["Hints", "checked_hints", "known_release", "with_known_hints"]

REFUSED_WHERE_UNUSED = ("scale", "pre_bias", "processed", "normalization")
WORDS: dict[str, Any] = {"scale": (int, float, tuple), "processed": bool}  # what hints are, if not text
KINDS: dict[Any, str] = {str: "it in words", bool: "True or False", WORDS["scale"]: "a number"}


def checked_hints(hints: dict[str, Any]) -> Hints:
    """Returns what was said of a coder; ConfigError names what cannot be said, and the nearest that can."""
    allowed = Hints.__dataclass_fields__
    for name in hints:
        if name not in allowed:
            raise ConfigError(
                f"{name}: not something to say of a coder; allowed: {', '.join(allowed)}.{nearest(name, allowed)}"
            )
    found = Hints(**hints)
    for name, value in hints.items():
        kind = WORDS.get(name, str)
        right = isinstance(value, kind) and (not isinstance(value, bool) or kind is bool)
        if value is not None and not right:
            raise ConfigError(f"{name}: {value!r} is a {type(value).__name__}; say {KINDS[kind]}")
    scales = found.scale if isinstance(found.scale, tuple) else (found.scale,)
    if any(value is not None and not 0 < value < math.inf for value in scales):
        raise ConfigError(f"scale: {found.scale} must be positive and finite")
    return found


def known_release(place: Place) -> Release | None:
    """Returns what the table of releases says of a place on the hub, or in its cache."""
    return release_at(place.files.identity, place.weights)


def with_known_hints(place: Place, known: Release | None) -> Place:
    """Returns a place among whose hints is what the table of releases knows of it, where the user has said nothing."""
    if known is None:
        return place
    said = {name: value for name, value in vars(place.hints).items() if value is not None}
    return replace(place, hints=Hints(**{**known.hints(), **said}))
