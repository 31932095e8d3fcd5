"""What a command tells: results on standard output, for people or as JSON, and what to do next on standard error."""

import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from .running import log


def report(as_json: Any, data: Any, lines: Iterable[str]) -> None:
    """Prints results: as JSON and nothing else where that was asked for, else as lines."""
    print(json.dumps(plain(data), indent=2) if as_json else "\n".join(lines))


def plain(value: Any) -> Any:
    """Returns a value as JSON can hold it: what is no finite number is null, what is no plain value its text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if callable(to_list := getattr(value, "tolist", None)):  # of numpy and torch
        return plain(to_list())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def wants_colors() -> bool:
    """Returns whether standard output is colored: never by $NO_COLOR, always by $FORCE_COLOR, else on a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") != "0":
        return True
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def say_next(*commands: Iterable[str | Path]) -> None:
    """Says what one may want to do next: commands by their words, as a shell takes them."""
    for i, words in enumerate(commands):
        log.info("%-12s %s", "" if i else "next", shlex.join(map(str, words)))


def tables(results: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Yields the figures of evaluated coders, a table for each."""
    from sae.evaluation.tables import table

    for name, found in results.items():
        rows = table(found)
        width = max(42, *(len(label) + 2 for label, _ in rows))
        yield from ("", name, *(f"  {label:{width}}{text}" for label, text in rows))
