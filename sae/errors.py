"""The errors users see: one line each, naming the field or file, the value, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """Bad usage or configuration; commands end with exit code 2."""


class DataError(RuntimeError):
    """A file that is damaged, foreign or of another version; commands end with exit code 1."""


class Stopped(Exception):
    """A clean stop asked for by a signal; commands end with exit code 75."""


def nearest(name: str, allowed: Iterable[str], count: int = 1) -> str:
    """Returns " Did you mean 'x'?" for the closest allowed names, or "" if none is close."""
    close = get_close_matches(str(name), list(allowed), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
