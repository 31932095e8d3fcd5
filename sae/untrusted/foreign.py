"""Files of others, which may be damaged or made to do harm: each ends in a value or in one line that names it."""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sae.base.errors import DataError
from sae.base.files import read_json
from sae.base.settings import read_yaml

JSON_BYTES, YAML_BYTES = 16 * 2**20, 2**17  # the largest configs; YAML is read at 50 kB a second
MOST_ALIASES = 16  # of YAML, which stand for text elsewhere in the file: a few lines of them can stand for anything
MOST_VALUES, DEEPEST = 1_000_000, 50


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Makes whatever goes wrong inside one DataError that names the file; one that is no file is not opened."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path} is a folder, a device or a pipe, not a file of tensors")
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file breaks its reader in any way
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is damaged or no {what}: {shown(why)}") from error


def shown(value: object) -> str:
    """Returns something that a file says as a short piece of one line."""
    text = str(value)
    return text if text.isprintable() and len(text) <= 200 else ascii(text)[:200]


def read_config(path: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON or YAML file of strangers; DataError if it holds none, or far too much."""
    is_yaml = path.suffix in (".yaml", ".yml")
    limit = YAML_BYTES if is_yaml else JSON_BYTES
    with reading(path, "config"):
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
