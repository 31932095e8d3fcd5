"""Sharded tensors on disk: safetensors files beside a manifest that knows what each must hold.

    header.json             kind, format version, fingerprint of everything the content depends on
    shard-000012.safetensors
    shards-PART.jsonl       one line per shard written: file, SHA-256, bytes, data types and shapes, and whose it is (a
                            hash of the fingerprint, as folders may be merged); one PART per writer
    meta.json               written last: what the owner wants to remember; its presence means the store is complete

Token and activation shards lie in stores. A crash loses at most the shard being written; a torn last line is ignored.
The manifest is appended to, not rewritten, because an activation store has a shard for every pass of the model.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.base.errors import DataError
from sae.base.files import load_tensors, read_json, remove_stale, save_tensors, sha256_file, write_json
from sae.base.lines import lines_of
from sae.base.settings import flat

log = logging.getLogger(__name__)

VERSION = 1
REMEDY = "run again with --repair, which makes it again"
HEADER, META = "header.json", "meta.json"
Entry = dict[str, Any]
"""What a manifest says of one shard."""


def fingerprint_key(fingerprint: dict[str, Any]) -> str:
    """Returns 16 hex digits that name a cache folder: a hash of the fingerprint's canonical JSON."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


class ShardWriter:
    """Adds shards to a store, new or begun earlier; DataError if the folder is a store of something else.

    `done` holds the indices of the shards that were there or have been written since. Several processes may add to one
    store, each as a `part` of its own.
    """

    def __init__(self, folder: Path, kind: str, fingerprint: dict[str, Any], part: str = "0") -> None:
        self.folder, self.journal = Path(folder), Path(folder) / f"shards-{part}.jsonl"
        self.key = fingerprint_key(fingerprint)
        if (self.folder / HEADER).exists():
            check_header(self.folder, kind, fingerprint)
            remove_stale(self.folder)
        else:
            write_json(self.folder / HEADER, {"kind": kind, "version": VERSION, "fingerprint": fingerprint})
        files = _shard_files(self.folder)
        found = _entries(self.folder, self.key)
        self.done = {index for index, entry in found.items() if self.folder / entry["file"] in files}

    def write(self, index: int, tensors: dict[str, Tensor]) -> Entry:
        """Writes one shard, in place of an earlier one of that index, and returns its manifest entry."""
        path = self.folder / file_name(index)
        written = save_tensors(path, tensors)  # the file is whole before the manifest names it
        entry = {
            "index": index,
            "store": self.key,
            "file": path.name,
            "sha256": written["sha256"],
            "bytes": written["bytes"],
            "tensors": {name: _described(tensor) for name, tensor in tensors.items()},
        }
        try:
            self._append(json.dumps(entry))
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.journal}: {error.strerror}") from error
        self.done.add(index)
        return entry

    def finish(self, meta: dict[str, Any]) -> None:
        """Marks the store complete, whoever wrote its shards; ValueError unless they are numbered 0, 1, 2 ..."""
        found = _entries(self.folder, self.key)
        missing = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
        if missing:
            raise ValueError(f"{self.folder} cannot be finished: shards {missing[:5]} were not written")
        for path in _shard_files(self.folder) - {self.folder / entry["file"] for entry in found.values()}:
            path.unlink()  # written just before a crash, so that no manifest names it
        write_json(self.folder / META, {**meta, "n_shards": len(found)})

    def _append(self, line: str) -> None:
        with open(self.journal, "ab+") as file:
            if file.tell():  # a line that a crash cut short is ended, so that the next one stands alone
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())


class Shards:
    """Reads the shards of a store, each checked against the manifest when this process first reads it.

    DataError if the folder is no store, of another kind or fingerprint (naming the keys that differ), from a newer
    version, or incomplete. A `partial` store may be incomplete: shards whose file is gone count as not yet written.

    Args:
        folder: where the store lies.
        kind: what its shards are, such as "tokens".
        fingerprint: what the content must depend on; None takes any.
        partial: whether a store that is still being written will do.
        verify: whether the checksum of a shard is compared when it is first read; size, types and shapes always are.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        fingerprint: dict[str, Any] | None = None,
        partial: bool = False,
        verify: bool = True,
    ) -> None:
        self.folder, self.partial, self.verify = Path(folder), partial, verify
        self.key = fingerprint_key(check_header(self.folder, kind, fingerprint))
        """Names what its content depends on."""
        if not partial and not (self.folder / META).exists():
            raise DataError(f"{self.folder}: incomplete; run the command that makes it again, it continues")
        self.meta: dict[str, Any] = read_json(self.folder / META) if (self.folder / META).exists() else {}
        self.entries: dict[int, Entry] = {}
        self.reload()
        if not partial and sorted(self.entries) != list(range(self.meta.get("n_shards", -1))):
            raise DataError(f"{self.folder}: lists {len(self.entries)} shards, not all it should; {REMEDY}")
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, index: int) -> bool:
        return index in self.entries

    def has_file(self, index: int) -> bool:
        """Returns whether a file for the shard lies there, be it known or not."""
        return (self.folder / file_name(index)).is_file()

    def add(self, index: int, entry: Entry) -> None:
        """Takes in a shard that was just written."""
        self.entries[index] = entry
        self._verified.add(index)

    def reload(self) -> None:
        """Takes in shards that other writers have added."""
        found = _entries(self.folder, self.key)
        files = _shard_files(self.folder)
        if self.partial:
            found = {index: entry for index, entry in found.items() if self.folder / entry["file"] in files}
        else:
            for extra in sorted(files - {self.folder / entry["file"] for entry in found.values()}):
                raise DataError(f"{extra}: does not belong to the store; delete it")
        self.entries = found

    def read(self, index: int) -> dict[str, Tensor]:
        """Returns the tensors of a shard, memory-mapped; DataError names a file that is not what was written."""
        if index not in self.entries:
            raise DataError(f"{self.folder}: has no shard {index}")
        entry = self.entries[index]
        path = self.folder / entry["file"]
        if index not in self._verified:
            self._check(path, entry, checksum=self.verify)
            self._verified.add(index)
        tensors = load_tensors(path)
        found = {name: _described(tensor) for name, tensor in tensors.items()}
        if found != entry["tensors"]:
            raise DataError(f"{path}: holds {found}, expected {entry['tensors']}; {REMEDY}")
        return tensors

    def bad(self, among: range | None = None) -> list[int]:
        """Returns the indices of shards, all or `among` some, that are missing or changed: those to write again."""
        found = []
        for index, entry in self.entries.items():
            if among is not None and index not in among:
                continue
            try:
                self._check(self.folder / entry["file"], entry, checksum=True)
            except DataError:
                found.append(index)
        return found

    def _check(self, path: Path, entry: Entry, checksum: bool) -> None:
        if not path.is_file():
            raise DataError(f"{path}: missing; {REMEDY}")
        if path.stat().st_size != entry["bytes"]:
            raise DataError(f"{path}: has {path.stat().st_size} bytes, expected {entry['bytes']}; {REMEDY}")
        if checksum and sha256_file(path) != entry["sha256"]:
            raise DataError(f"{path}: changed since it was written (checksum); {REMEDY}")


def remove_damaged(folder: Path, kind: str, fingerprint: dict[str, Any], among: range | None = None) -> None:
    """Deletes what is damaged of a partial store, so that it is made again: single shards, or all if it is not ours.

    With `among`, only those shards are looked at.
    """
    if not folder.exists():
        return
    try:
        shards = Shards(folder, kind, fingerprint, partial=True)
    except DataError as error:
        log.warning("made again: %s", error)
        shutil.rmtree(folder)
        return
    for index in shards.bad(among):
        path = folder / shards.entries[index]["file"]
        log.warning("made again: %s", path)
        path.unlink(missing_ok=True)


def file_name(index: int) -> str:
    """Returns the name of a shard's file."""
    return f"shard-{index:06d}.safetensors"


def _shard_files(folder: Path) -> set[Path]:
    return set(folder.glob("shard-*.safetensors"))


def _described(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def journals(folder: Path, key: str) -> dict[Path, dict[int, Entry]]:
    """Returns what each writer's journal lists, by index; DataError if one lists shards of another store than `key`."""
    found = {}
    for journal in sorted(folder.glob("shards-*.jsonl")):
        entries = found[journal] = {}
        for line in lines_of(journal.read_bytes(), errors="replace"):
            try:
                entry = json.loads(line)
                index, whose = entry["index"], entry.get("store", key)
                # the name is derived, not believed: a manifest from elsewhere could point out of the folder
                entries[index] = {**entry, "file": file_name(index)}
            except (ValueError, TypeError, KeyError, AttributeError):  # torn by a crash: its shard is written again
                continue
            if whose != key:
                raise DataError(f"{journal}: lists what was made with other settings; delete it and make that again")
    return found


def _entries(folder: Path, key: str) -> dict[int, Entry]:
    found: dict[int, Entry] = {}
    for entries in journals(folder, key).values():
        found |= entries
    return dict(sorted(found.items()))


def check_header(folder: Path, kind: str, fingerprint: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the fingerprint of a store; DataError if it is none, or of another kind or fingerprint than is given."""
    try:
        header = read_json(folder / HEADER)
    except DataError as error:
        raise DataError(f"{error}; {REMEDY}") from error
    known = {"kind": str, "version": int, "fingerprint": dict}
    if not isinstance(header, dict) or not all(isinstance(header.get(key), type_) for key, type_ in known.items()):
        raise DataError(f"{folder / HEADER}: not the header of a store; {REMEDY}")
    if header["version"] > VERSION:
        raise DataError(f"{folder}: version {header['version']} is newer than {VERSION}; upgrade sae-interp")
    if header["kind"] != kind:
        raise DataError(f"{folder}: holds {header['kind']}, not {kind}; {REMEDY}")
    if fingerprint is None:
        return header["fingerprint"]
    stored, wanted = flat(header["fingerprint"]), flat(json.loads(json.dumps(fingerprint)))
    differing = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
    if differing:
        pairs = ", ".join(f"{key}: {stored.get(key)!r} there, {wanted.get(key)!r} wanted" for key in differing)
        raise DataError(f"{folder}: was made with other settings ({pairs}); {REMEDY}")
    return header["fingerprint"]
