r"""Bookmarks and edited labels of a run's latents, in notes.jsonl beside what they are about.

    {"version": 1, "latent": 508, "bookmark": true, "label": "months", "changed": "2026-11-30T02:20:00+00:00"}\n

A line is added for every change and flushed to disk before anybody is told that it is kept, and none is ever changed:
the last one of a latent counts, those before are its history, and a torn last line is one that nobody was told of. An
edited label stands beside the explanation, as by a person, and replaces no score; `Notes(run_dir).export(file)` writes
what `sae-explain RUN --explanations FILE` scores.
"""

import errno
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from sae.base.errors import ConfigError, DataError
from sae.base.files import sync, write_whole
from sae.base.visible import visible

log = logging.getLogger(__name__)

FILE = "notes.jsonl"
VERSION = 1
LONGEST_CHARS = 10_000
KEEP: Any = object()


@dataclass(frozen=True)
class Note:
    """What people have noted of a latent."""

    latent: int
    bookmark: bool = False
    label: str | None = None
    """In place of the explanation, by a person."""
    changed: str = ""
    """When, as ISO 8601 in UTC."""
    history: int = 0
    """How many changes there have been."""


class Outdated(ConfigError):
    """A label that somebody else has changed since it was looked at."""


class Notes:
    """The notes of the run in a folder; of several threads and processes one writes at a time, and all see it."""

    def __init__(self, run_dir: Path, d_sae: int | None = None) -> None:
        """Reads what is kept; DataError if that is of a newer version."""
        self.path, self.d_sae = Path(run_dir) / FILE, d_sae
        self._lock = threading.Lock()
        self._notes: dict[int, Note] = {}
        self._read = 0
        """Bytes of the file that are known."""
        self._file: int | None = None
        """Which file that is."""
        self._catch_up()

    def __iter__(self) -> Iterator[Note]:
        """Yields the notes of all latents that have any, ascending."""
        with self._lock:
            self._catch_up()
            return iter([note for _, note in sorted(self._notes.items()) if note.bookmark or note.label is not None])

    def labels(self) -> dict[int, str]:
        """Returns the edited labels by latent."""
        return {note.latent: note.label for note in self if note.label is not None}

    def history(self, latent: int) -> list[Note]:
        """Returns all that was ever noted of a latent, the newest last."""
        with self._lock:
            lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []
        found = [note for line in lines if (note := _note(line, self.path)) is not None and note.latent == latent]
        return [replace(note, history=number) for number, note in enumerate(found, 1)]

    def change(self, latent: int, bookmark: bool = KEEP, label: str | None = KEEP, was: str | None = KEEP) -> Note:
        """Keeps a change, and returns the note once it is on disk.

        Args:
            latent: its id.
            bookmark: whether it is bookmarked; as it is if not given.
            label: its edited label; None takes it away.
            was: the label that was looked at: where another is kept by now, nothing is (Outdated).

        ConfigError in one line for what is no note, or if it cannot be written, which leaves the file as it was.
        """
        self._check(latent, bookmark, label)
        with self._lock:
            self._catch_up()
            before = self._notes.get(latent, Note(latent))
            label = label.strip() or None if isinstance(label, str) else label
            if was is not KEEP and label is not KEEP and before.label not in (was, label):
                raise Outdated("label: it was edited meanwhile; look at the kept one, then save again")
            changes: dict[str, Any] = {"bookmark": bookmark, "label": label}
            changes = {name: value for name, value in changes.items() if value is not KEEP}
            after = replace(before, **changes)
            if after == before:
                return before
            now = datetime.now(UTC).isoformat(timespec="seconds")
            row = {
                "version": VERSION,
                "latent": latent,
                "bookmark": after.bookmark,
                "label": after.label,
                "changed": now,
            }
            _append(self.path, (json.dumps(row) + "\n").encode())
            self._catch_up()
            return self._notes[latent]

    def export(self, path: Path) -> int:
        """Writes the edited labels as `sae-explain --explanations FILE` takes them, and returns how many there are."""
        lines = [json.dumps({"latent": latent, "text": text}) + "\n" for latent, text in self.labels().items()]
        write_whole(path, lambda draft: draft.write_text("".join(lines), encoding="utf-8"))
        return len(lines)

    def to_json(self) -> list[dict[str, Any]]:
        """Returns all notes as plain values; `shown` is the label with codes for what cannot be seen."""
        return [{**asdict(note), "shown": note.label and visible(note.label)} for note in self]

    def _check(self, latent: Any, bookmark: Any, label: Any) -> None:
        most = "" if self.d_sae is None else f" from 0 to {self.d_sae - 1}"
        if type(latent) is not int or latent < 0 or (self.d_sae is not None and latent >= self.d_sae):
            raise ConfigError(f"latent: {latent!r} is not the id of a latent{most}")
        if bookmark is not KEEP and not isinstance(bookmark, bool):
            raise ConfigError(f"bookmark: {bookmark!r} is neither true nor false")
        if label is not KEEP and label is not None and not isinstance(label, str):
            raise ConfigError("label: it is no text")
        if isinstance(label, str) and not _is_text(label):
            raise ConfigError("label: it holds half of a character")
        if isinstance(label, str) and len(label) > LONGEST_CHARS:
            raise ConfigError(f"label: it has {len(label)} characters; at most {LONGEST_CHARS} are allowed")

    def _catch_up(self) -> None:
        """Reads the lines that have come since, of other processes too; a line that has no end is not there yet."""
        if not self.path.is_file():
            self._notes, self._read, self._file = {}, 0, None
            return
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._file or found.st_size < self._read:  # somebody has put another in its place
                    self._notes, self._read, self._file = {}, 0, found.st_ino
                file.seek(self._read)
                text = file.read()
        except OSError as error:
            raise DataError(f"notes: {self.path} cannot be read ({error.strerror})") from error
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            note = _note(line, self.path)
            if note is not None:
                history = self._notes[note.latent].history if note.latent in self._notes else 0
                self._notes[note.latent] = replace(note, history=history + 1)
        self._read += len(whole)


def _append(path: Path, line: bytes) -> None:
    """Adds a line behind the last whole one, and returns once it is on disk."""
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            with suppress(OSError):  # some network file systems have no locks
                lock_descriptor(file.fileno(), blocking=True)
            end = file.read().rfind(b"\n") + 1
            try:
                file.truncate(end)
                file.seek(end)
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, end)
                raise
        sync(path.parent)
    except OSError as error:
        raise ConfigError(f"notes: they cannot be written ({error.strerror}); mend that, then save again") from error


def _is_text(text: str) -> bool:
    """Whether a text has no halves of characters, which no answer and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _note(line: bytes, path: Path) -> Note | None:
    """Returns what a line says; None for one that a crash has torn, to which nothing was added since."""
    try:
        row = json.loads(line)
        version = row["version"]
        if version <= VERSION:
            latent, label = row["latent"], row["label"]
            if type(latent) is not int or latent < 0 or not isinstance(label, str | None) or not _is_text(label or ""):
                raise TypeError
            return Note(latent, bool(row["bookmark"]), label, str(row["changed"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        log.warning("%s: a line is damaged and left out: %.60r", path.name, line)
        return None
    raise DataError(f"{path}: version {version} is newer than {VERSION}; upgrade sae-interp")
