"""The answers so far, on disk: one sqlite file, so that no question is paid twice.

Only answers that are final are kept: those that hold something, and those whose failure (a refusal, an answer that does
not parse) asking again would hardly change. The questions themselves are not stored, only hashes of them. What a batch
answers beyond what was asked this time is kept as the server gave it, until its question comes. With the answers, in
the same transaction, goes what they cost.

An answer is on disk before it is handed on. One thread writes: what comes in while it commits goes into the next
transaction, so that neither the event loop nor the answers wait for each other's flush. In WAL mode with
`synchronous=NORMAL` a committed answer survives any end of the process; a power cut may lose the last moments and never
damages the file.
"""

import asyncio
import contextlib
import json
import os
import queue
import sqlite3
import threading
from array import array
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from interp.client.ledger import COUNTED
from interp.client.requests import FINAL, Reply
from sae.base.errors import ConfigError, DataError

VERSION = 1
BUSY_S = 60.0
"""How long to wait for another process that writes to the file."""
_TABLES = """
CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS raw (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (role TEXT PRIMARY KEY, calls INTEGER, cached INTEGER, tokens_in INTEGER,
    tokens_out INTEGER, estimated INTEGER, usd REAL) WITHOUT ROWID;
"""
_COLUMNS = {"replies": ("key", "reply"), "facts": ("name", "value"), "raw": ("key", "answer")}
_STORE = "INSERT OR REPLACE INTO {} VALUES (?, ?)"
_ADD = (
    f"INSERT INTO spent (role, {', '.join(COUNTED)}) VALUES (?{', ?' * len(COUNTED)}) ON CONFLICT(role) DO UPDATE SET "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTED)  # no price once: none in all
)

Row = tuple[str, str, str | None]
"""Table, key, value; None to delete. What is `spent` is added to what stands there."""


class Cache:
    """A map from keys to replies, and from names to facts (what a server can do, which batches are open)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()  # sqlite would make it closed to a group that the umask lets write; its journals follow suit
            self._reader = sqlite3.connect(path, timeout=BUSY_S)
        except (sqlite3.OperationalError, OSError) as error:
            raise ConfigError(f"cache: cannot write to {path}: {error}") from error
        try:
            self._prepare()
        except Exception:
            self._reader.close()
            raise
        self._rows: queue.SimpleQueue[tuple[list[Row], asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="cache", daemon=True)
        self._writer.start()

    @property
    def id(self) -> str:
        """Returns 16 hex digits that name this file: what remote batches are tagged with."""
        return self.fact("id")

    def reply(self, key: str) -> Reply | None:
        """Returns the stored answer to a question, marked as cached."""
        text = self._get("replies", key)
        return None if text is None else from_json(text)

    def fact(self, name: str) -> Any:
        """Returns a stored fact; None where there is none."""
        text = self._get("facts", name)
        return None if text is None else json.loads(text)

    def facts(self, prefix: str) -> dict[str, Any]:
        """Returns the facts whose names begin so."""
        query = "SELECT name, value FROM facts WHERE substr(name, 1, ?) = ? ORDER BY name"
        return {name: json.loads(text) for name, text in self._reader.execute(query, (len(prefix), prefix))}

    def raw(self, key: str) -> Any:
        """Returns what a server answered to a question that was not asked yet; None where there is nothing."""
        text = self._get("raw", key)
        return None if text is None else json.loads(text)

    def spent(self) -> dict[str, dict[str, Any]]:
        """Returns by role what all commands so far have counted: the sums of the ledger's COUNTED."""
        return _spent(self._reader)

    async def keep(
        self,
        replies: Mapping[str, Reply],
        spent: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        facts: Mapping[str, Any] = MappingProxyType({}),
        raw: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Returns when those of the replies that are final are on disk with all the rest, or nothing is.

        Args:
            replies: by key.
            spent: by role, what came to each of COUNTED since it was last told.
            facts: by name; None forgets one.
            raw: by key, what a server answered, as plain JSON values; None forgets it.
        """
        rows: list[Row] = [
            ("spent", role, json.dumps([counts[name] for name in COUNTED])) for role, counts in spent.items()
        ]
        rows += [("replies", k, to_json(reply)) for k, reply in replies.items() if reply.ok or reply.failure in FINAL]
        rows += [("facts", name, None if v is None else json.dumps(v)) for name, v in facts.items()]
        rows += [("raw", key, None if v is None else json.dumps(v)) for key, v in raw.items()]
        if rows:
            await self._put(rows)

    async def note(self, facts: Mapping[str, Any]) -> None:
        """Returns when facts are on disk, all or none; None forgets one."""
        await self.keep({}, facts=facts)

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self._rows.put(None)
        self._writer.join()
        self._reader.close()

    def _prepare(self) -> None:
        """Makes the tables, if they are not there."""
        try:
            version = self._reader.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise DataError(f"{self.path} was written by a later version of this package; upgrade it")
            self._reader.execute("PRAGMA journal_mode=WAL")  # where the file system cannot, sqlite stays with its own
            with self._reader:
                self._reader.executescript(_TABLES)
                self._reader.execute(f"PRAGMA user_version={VERSION}")
                self._reader.execute("INSERT OR IGNORE INTO facts VALUES ('id', ?)", (json.dumps(os.urandom(8).hex()),))
        except sqlite3.OperationalError as error:
            raise ConfigError(f"cache: cannot write to {self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.path} is no cache of answers, or damaged ({error}); move it away") from error

    def _get(self, table: str, key: str) -> str | None:
        column, value = _COLUMNS[table]
        row = self._reader.execute(f"SELECT {value} FROM {table} WHERE {column} = ?", (key,)).fetchone()
        return row[0] if row else None

    async def _put(self, rows: list[Row]) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rows.put((rows, done))
        await done

    def _store(self, rows: list[Row], connection: sqlite3.Connection) -> None:
        with connection:
            for table, key, value in rows:
                if value is None:
                    connection.execute(f"DELETE FROM {table} WHERE {_COLUMNS[table][0]} = ?", (key,))
                elif table == "spent":
                    connection.execute(_ADD, (key, *json.loads(value)))
                else:
                    connection.execute(_STORE.format(table), (key, value))

    def _write(self) -> None:
        """The writing thread: whatever has come in since the last commit makes one transaction."""
        connection, ended = sqlite3.connect(self.path, timeout=BUSY_S), False
        connection.execute("PRAGMA synchronous=NORMAL")
        while not ended:
            waiting = [self._rows.get()]
            while not self._rows.empty():
                waiting.append(self._rows.get())
            ended = None in waiting
            rows = [row for item in waiting if item for row in item[0]]
            error: Exception | None = None
            try:
                self._store(rows, connection)
            except sqlite3.Error as failed:
                error = OSError(f"cannot write {self.path}: {failed}")
            for item in waiting:
                if item:
                    _tell(item[1], error)
        connection.close()


def spent_in(path: Path) -> dict[str, dict[str, Any]]:
    """Returns by role what all commands that worked with a cache file have counted: the sums of the ledger's COUNTED.

    {} where there is no such file, or it was written before such sums were kept; DataError if it is damaged.
    """
    if not path.is_file():
        return {}
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_S)) as connection:
        try:
            there = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'spent'").fetchone()
            return _spent(connection) if there else {}
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path} is no cache of answers, or damaged ({error}); move it away") from error


def _spent(connection: sqlite3.Connection) -> dict[str, dict[str, Any]]:
    rows = connection.execute(f"SELECT role, {', '.join(COUNTED)} FROM spent ORDER BY role")
    return {role: dict(zip(COUNTED, counts, strict=True)) for role, *counts in rows}


def to_json(reply: Reply) -> str:
    """Returns a reply as text; vectors are single-precision bytes, which take a fifth of the room of digits."""
    plain: dict[str, Any] = {name: value for name, value in vars(reply).items() if value and name != "cached"}
    plain["vectors"] = [b64encode(array("f", vector).tobytes()).decode() for vector in reply.vectors]
    if reply.data is not None:
        plain["data"] = reply.data
    return json.dumps(plain)


def from_json(text: str) -> Reply:
    """Returns what `to_json` wrote, marked as cached."""
    plain = json.loads(text)
    vectors = tuple(tuple(array("f", b64decode(vector))) for vector in plain.pop("vectors"))
    logprobs = tuple(map(tuple, plain.pop("logprobs", ())))
    counts = tuple(plain.pop("counts", ()))
    return Reply(**plain, vectors=vectors, logprobs=logprobs, counts=counts, cached=True)


def _tell(done: "asyncio.Future[None]", error: Exception | None) -> None:
    def tell() -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
        done.get_loop().call_soon_threadsafe(tell)
