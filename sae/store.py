"""Sharded tensors on disk: safetensors files beside a manifest that knows what each must hold.

    header.json             kind, format version, fingerprint of everything the content depends on
    shard-000012.safetensors
    shards-PART.jsonl       one line per shard written: file, SHA-256, bytes, data types and shapes; one PART per writer
    meta.json               written last: what the owner wants to remember; its presence means the store is complete

Token and activation shards lie in stores. A crash loses at most the shard being written; a torn last line is ignored.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from sae.errors import DataError
from sae.files import atomic_write, load_tensors, read_json, sha256_file, write_json

VERSION = 1
HEADER, META = "header.json", "meta.json"


def fingerprint_key(fingerprint: dict[str, Any]) -> str:
    """Returns 16 hex digits that name a cache folder: a hash of the fingerprint's canonical JSON."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


class ShardWriter:
    """Adds shards to a store, new or begun earlier; DataError if the folder is a store of something else."""

    def __init__(self, folder: Path, kind: str, fingerprint: dict[str, Any], part: str = "0") -> None:
        self.folder, self.journal = Path(folder), Path(folder) / f"shards-{part}.jsonl"
        if (self.folder / HEADER).exists():
            _check_header(self.folder, kind, fingerprint)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / HEADER, {"kind": kind, "version": VERSION, "fingerprint": fingerprint})
        self.done = set(_entries(self.folder))

    def write(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Writes one shard and returns its manifest entry. The file is whole before the manifest names it."""
        name = f"shard-{index:06d}.safetensors"
        data = safetensors.torch.save({key: value.contiguous().cpu() for key, value in tensors.items()})
        atomic_write(self.folder / name, data)
        entry = {
            "index": index,
            "file": name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "tensors": {key: _described(value) for key, value in tensors.items()},
        }
        self._drop_torn_line()
        with open(self.journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done.add(index)
        return entry

    def finish(self, meta: dict[str, Any]) -> None:
        """Marks the store complete."""
        write_json(self.folder / META, {"n_shards": len(self.done), **meta})

    def _drop_torn_line(self) -> None:
        """Ends a line that a crash cut short, so that the next one stands alone."""
        if self.journal.exists() and self.journal.stat().st_size:
            with open(self.journal, "rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")


class Shards:
    """Reads the shards of a store, each checked against the manifest when it is first read.

    DataError if the folder is no store, of another kind or fingerprint (naming the keys that differ), from a newer
    version, or incomplete (unless `partial`).
    """

    def __init__(
        self, folder: Path, kind: str, fingerprint: dict[str, Any] | None = None, partial: bool = False
    ) -> None:
        self.folder = Path(folder)
        _check_header(self.folder, kind, fingerprint)
        if not partial and not (self.folder / META).exists():
            raise DataError(f"{self.folder}: incomplete; run the command that makes it again, it continues")
        self.meta: dict[str, Any] = read_json(self.folder / META) if (self.folder / META).exists() else {}
        self.entries = _entries(self.folder)
        if not partial and len(self.entries) != self.meta["n_shards"]:
            raise DataError(f"{self.folder}: lists {len(self.entries)} of {self.meta['n_shards']} shards; delete it")
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, index: int) -> bool:
        return index in self.entries

    def add(self, index: int, entry: dict[str, Any]) -> None:
        """Takes in a shard that was just written."""
        self.entries[index] = entry
        self._verified.add(index)

    def reload(self) -> None:
        """Takes in shards that other writers have added."""
        self.entries = _entries(self.folder)

    def read(self, index: int) -> dict[str, Tensor]:
        """Returns the tensors of a shard, memory-mapped; DataError names a file that is not what was written."""
        if index not in self.entries:
            raise DataError(f"{self.folder}: has no shard {index}")
        entry = self.entries[index]
        path = self.folder / entry["file"]
        if index not in self._verified:
            self._verify(path, entry)
            self._verified.add(index)
        tensors = load_tensors(path)
        found = {name: _described(tensor) for name, tensor in tensors.items()}
        if found != entry["tensors"]:
            raise DataError(f"{path}: holds {found}, expected {entry['tensors']}; delete it, it is then made again")
        return tensors

    def bad(self) -> list[int]:
        """Returns the indices of shards that are missing or changed."""
        found = []
        for index, entry in self.entries.items():
            try:
                self._verify(self.folder / entry["file"], entry)
            except DataError:
                found.append(index)
        return found

    def _verify(self, path: Path, entry: dict[str, Any]) -> None:
        if not path.is_file():
            raise DataError(f"{path}: missing; run again with --repair to rebuild it")
        if path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
            raise DataError(f"{path}: changed since it was written (checksum); run again with --repair to rebuild it")


def _described(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _entries(folder: Path) -> dict[int, dict[str, Any]]:
    entries = {}
    for journal in sorted(folder.glob("shards-*.jsonl")):
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # torn by a crash: its shard is written again
                continue
            entries[entry["index"]] = entry
    return dict(sorted(entries.items()))


def _check_header(folder: Path, kind: str, fingerprint: dict[str, Any] | None) -> None:
    header = read_json(folder / HEADER)
    if header.get("kind") != kind:
        raise DataError(f"{folder}: holds {header.get('kind')}, not {kind}")
    if header.get("version", 0) > VERSION:
        raise DataError(f"{folder}: version {header['version']} is newer than {VERSION}; upgrade sae-interp")
    stored = header.get("fingerprint", {})
    wanted = stored if fingerprint is None else json.loads(json.dumps(fingerprint))
    differing = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
    if differing:
        pairs = ", ".join(f"{key}: {stored.get(key)!r} there, {wanted.get(key)!r} wanted" for key in differing)
        raise DataError(f"{folder}: was made with other settings ({pairs})")
