"""Configs of strangers: JSON and YAML that come to an end, and values in them that are what they should be."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sae.base.errors import DataError, nearest
from sae.base.files import read_json
from sae.base.settings import read_yaml
from sae.untrusted.damage import naming_damage, printable

JSON_BYTES, YAML_BYTES = 16 * 2**20, 2**17  # the largest configs; YAML is read at 50 kB a second
MOST_ALIASES = 16  # of YAML, which stand for text elsewhere in the file: a few lines of them can stand for anything
MOST_VALUES, DEEPEST = 1_000_000, 50
LARGEST = 2**40  # no width or count of a coder is larger


def read_config(path: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON or YAML file of strangers; DataError if it holds none, or far too much."""
    is_yaml = path.suffix in (".yaml", ".yml")
    limit = YAML_BYTES if is_yaml else JSON_BYTES
    with naming_damage(path, "config"):
        if path.stat().st_size > limit:
            raise DataError(f"{path} is refused: it has {path.stat().st_size:,} bytes, and a config at most {limit:,}")
        if is_yaml:
            _check_tokens(path)
        found = read_yaml(path) if is_yaml else read_json(path)
        if not isinstance(found, dict):
            raise DataError(f"{path} holds a {type(found).__name__}, expected an object")
        _check_nesting(found, path)
        return found


def _check_tokens(path: Path) -> None:
    """Raises DataError for YAML whose aliases could stand for far more than it has, or that is slow to look at."""
    depth = aliases = 0
    for token in yaml.scan(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader):
        kind = type(token).__name__
        depth += kind.endswith("StartToken") - kind.endswith("EndToken")
        aliases += kind == "AliasToken"
        if depth > DEEPEST or aliases > MOST_ALIASES:
            raise DataError(f"{path} is refused: its values lie too deep in each other, or are there too often")


def _check_nesting(tree: Any, path: Path) -> None:
    """Raises DataError if values lie too deep in each other to be shown, or are too many through aliases."""
    todo, left = [(tree, 0)], MOST_VALUES
    while todo:
        value, depth = todo.pop()
        left -= len(value)
        if left < 0 or depth > DEEPEST:
            raise DataError(f"{path} is refused: its values lie too deep in each other, or are there too often")
        inner = value.values() if isinstance(value, dict) else value
        todo += [(item, depth + 1) for item in inner if isinstance(item, dict | list)]


def as_int(value: Any, name: str, source: object) -> int:
    """Returns a whole number of a config, 0 or more; DataError names the field if it is none."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST
    if not fits or value != int(value):
        raise DataError(f"{source}: {name} is {_said(value)}, expected a whole number")
    return int(value)


def as_flag(config: Mapping[str, Any], name: str, source: object, default: bool | None = False) -> bool:
    """Returns a truth value of a config, `default` where it is left out or null; DataError names one that is none.

    Without a default (None), it may not be left out either.
    """
    value = default if config.get(name) is None else config[name]
    if not isinstance(value, bool):
        raise DataError(f"{source}: {name} is {value!r}, expected true or false")
    return value


def one_of(value: Any, allowed: Iterable[str], name: str, source: object) -> str:
    """Returns a word of a config that must be one of these; DataError names the field, the value and the nearest."""
    words = list(allowed)
    if value not in words:
        close = nearest(value, words) if isinstance(value, str) and len(value) < 100 else ""
        raise DataError(f"{source}: {name} is {_said(value)}; known are {', '.join(words)}.{close}")
    return value


def _said(value: Any) -> str:
    return printable(repr(value)) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
