"""The errors a user can meet. Each carries the exit code that a command ends with."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting or a request that cannot be carried out; the message names the field, the value and what is allowed."""

    exit_code = 2


class DataError(RuntimeError):
    """A file that is damaged, incomplete or not ours; the message names the file and how to repair it."""

    exit_code = 1


class Stopped(Exception):
    """Work that ended early and cleanly because a signal asked for it."""

    exit_code = 75


def nearest(name: str, allowed: Iterable[str], count: int = 1) -> str:
    """Returns " Did you mean 'x'?" with up to `count` allowed names close to `name`, or "" if none is."""
    matches = difflib.get_close_matches(str(name), list(dict.fromkeys(allowed)), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""
