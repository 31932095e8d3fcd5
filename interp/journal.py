"""Journals: one JSON line for every finished piece of work, appended, so that a crash loses at most the line in hand."""

import json
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from sae.errors import DataError
from sae.files import append

VERSION = 1


class Journal:
    """A file of rows, each with a key; the last row of a key is the one that counts.

    What a crash left of a torn last line is cut off when the journal is opened.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path, self.key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)
        self._where: dict[Hashable, tuple[int, str]] = {}
        if path.is_file():
            end = 0
            with path.open("rb+") as file:
                for line in file:
                    row = _parsed(line)
                    if row is not None and row.get("version", 0) > VERSION:
                        raise DataError(f"{path}: version {row['version']} is newer than {VERSION}; upgrade sae-interp")
                    if row is not None:
                        self._where[self._key(row)] = end, str(row.get("status", ""))
                    elif not line.endswith(b"\n"):
                        file.truncate(end)
                        break
                    end += len(line)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._where

    def status(self, key: Hashable) -> str:
        """Returns the status of a row, "" if there is none."""
        return self._where[key][1] if key in self._where else ""

    def keys(self) -> list[Any]:
        """Returns the keys of all rows."""
        return list(self._where)

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        line = json.dumps({"version": VERSION, **row}, allow_nan=False, ensure_ascii=False) + "\n"
        start = self.path.stat().st_size if self.path.exists() else 0
        append(self.path, line)
        self._where[self._key(row)] = start, str(row.get("status", ""))

    def get(self, key: Hashable) -> dict[str, Any] | None:
        """Returns the row of a key, or None."""
        if key not in self._where:
            return None
        with self.path.open("rb") as file:
            file.seek(self._where[key][0])
            return _parsed(file.readline())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows that count, in the order in which they were written."""
        wanted = {start for start, _ in self._where.values()}
        if not wanted:
            return
        with self.path.open("rb") as file:
            start = 0
            for line in file:
                row = _parsed(line) if start in wanted else None
                start += len(line)
                if row is not None:
                    yield row

    def _key(self, row: dict[str, Any]) -> Hashable:
        return tuple(row[name] for name in self.key)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
