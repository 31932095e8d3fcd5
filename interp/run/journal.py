"""Journals: one JSON line for every finished piece of work, appended: a crash loses at most the line in hand."""

import json
import os
from collections.abc import Collection, Hashable, Iterator
from pathlib import Path
from typing import Any

from sae.base.errors import DataError
from sae.base.files import append

VERSION = 1


class Journal:
    """A file of rows, each with a key; the last row of a key is the one that counts.

    What a crash left of a torn last line does not count, and is cut off before the next row is added; until then the
    file is only read, since it may be that of a run that goes on. Rows of other processes are seen by a new journal.

    Of large rows much is looked at by few: where `until` names a field, all rows are read as far as that alone, unless
    more is asked for. It must be written behind the key and the status. `get` reads the whole of one.
    """

    def __init__(self, path: Path, key: tuple[str, ...], until: str = "") -> None:
        self.path, self.key, self.until = path, key, until
        path.parent.mkdir(parents=True, exist_ok=True)
        self._where: dict[Any, tuple[int, str]] = {}
        self._torn: int | None = None
        """Where a last line begins that has no end."""
        if path.is_file():
            end = 0
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        self._torn = end
                        break
                    row = _parsed(line, until)
                    if row is not None and row.get("version", 0) > VERSION:
                        raise DataError(f"{path}: version {row['version']} is newer than {VERSION}; upgrade sae-interp")
                    if row is not None:
                        self._where[self._key(row)] = end, str(row.get("status", ""))
                    end += len(line)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._where

    def status(self, key: Hashable) -> str:
        """Returns the status of a row, "" if there is none."""
        return self._where[key][1] if key in self._where else ""

    def __iter__(self) -> Iterator[Any]:
        """Yields the keys of all rows."""
        return iter(list(self._where))

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        data = {"version": VERSION, **row}
        line = json.dumps(data, allow_nan=False, separators=(",", ":")) + "\n"  # ASCII: a reply need not be valid UTF-8
        if self._torn is not None:
            os.truncate(self.path, self._torn)
        self._torn = self.path.stat().st_size if self.path.exists() else 0  # until the whole line is there
        append(self.path, line)
        self._where[self._key(row)] = self._torn, str(row.get("status", ""))
        self._torn = None

    def get(self, key: Hashable) -> dict[str, Any] | None:
        """Returns the row of a key, or None."""
        if key not in self._where:
            return None
        with self.path.open("rb") as file:
            file.seek(self._where[key][0])
            return _parsed(file.readline())

    def rows(self, latents: Collection[int] | None = None, until: str | None = None) -> Iterator[dict[str, Any]]:
        """Yields the rows that count, in the order of their keys, whatever order they were written in: all, or those of
        some latents, with which keys begin; as far as a field where one is named.
        """
        keys: list[Any] = [key for key in self._where if latents is None or key[0] in latents]
        if not keys:
            return
        with self.path.open("rb") as file:
            for key in sorted(keys):
                file.seek(self._where[key][0])
                row = _parsed(file.readline(), self.until if until is None else until)
                if row is not None:
                    yield row

    def _key(self, row: dict[str, Any]) -> Hashable:
        return tuple(row[name] for name in self.key)


def _parsed(line: bytes, until: str = "") -> dict[str, Any] | None:
    end = line.find(f'"{until}":'.encode()) if until else -1  # in a text, there would be a backslash before a quote
    if end >= 0:
        line = line[:end].rstrip(b", ") + b"}"
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
