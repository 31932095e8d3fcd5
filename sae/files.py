"""Files that are whole or absent: atomic writes, published folders with checksums, and the lock of a run folder.

This is the only place that renames files.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from sae.errors import ConfigError, DataError

MANIFEST, COMPLETE, LOCK = "manifest.json", "COMPLETE", ".lock"


def cache_dir() -> Path:
    """Returns where tokens, activations and converted models are kept: $SAE_CACHE or ~/.cache/sae-interp."""
    return Path(os.environ.get("SAE_CACHE") or "~/.cache/sae-interp").expanduser()


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a file so that its name always holds the old or the new content, whole, also after a crash."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def write_json(path: Path, data: Any) -> None:
    """Writes plain values as JSON, atomically; ValueError for NaN, which JSON has not."""
    atomic_write(path, json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Returns the values in a JSON file; DataError names a file that is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors as safetensors, atomically."""
    atomic_write(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file; DataError names a file that is missing, cut short or none."""
    try:
        return safetensors.torch.load_file(path, device=device)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as safetensors ({error})") from error


def sha256_file(path: Path) -> str:
    """Returns the hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_join(root: Path, *parts: str) -> Path:
    """Returns root/parts; DataError if that would leave root, by "..", an absolute part or a link."""
    path = Path(root, *parts)
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise DataError(f"{'/'.join(parts)!r}: leads out of {root}")
    return path


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """Yields a draft that becomes `folder`, with checksums and a COMPLETE mark, if the block ends without error."""
    folder = Path(folder)
    draft = _temporary(folder)
    draft.mkdir(parents=True)
    try:
        yield draft
        names = sorted(str(p.relative_to(draft)) for p in draft.rglob("*") if p.is_file())
        entries = {
            name: {"sha256": sha256_file(draft / name), "bytes": (draft / name).stat().st_size} for name in names
        }
        write_json(draft / MANIFEST, entries)
        atomic_write(draft / COMPLETE, "")
        os.replace(draft, folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def is_complete(folder: Path) -> bool:
    """Returns whether a folder was published whole."""
    return (Path(folder) / COMPLETE).is_file()


def verify(folder: Path) -> None:
    """Raises DataError naming the first file of a published folder that is missing, added or changed."""
    folder = Path(folder)
    entries = read_json(folder / MANIFEST)
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST, COMPLETE}
    for name in sorted(present ^ set(entries)):
        raise DataError(f"{folder / name}: {'missing' if name in entries else 'not part of what was saved'}")
    for name, entry in entries.items():
        if (folder / name).stat().st_size != entry["bytes"] or sha256_file(folder / name) != entry["sha256"]:
            raise DataError(f"{folder / name}: changed since it was saved (size or checksum differs)")


def remove_stale(parent: Path) -> None:
    """Removes drafts that killed processes left in `parent`."""
    for path in Path(parent).glob(".*.tmp-*"):
        if not _is_alive(path.name.rpartition("-")[2]):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


class FolderLock:
    """Holds a folder for one process, from `with` to its end; a crash frees it. ConfigError names another holder."""

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / LOCK

    def __enter__(self) -> "FolderLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run_dir: cannot write to {self.path.parent} ({error.strerror})") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.seek(0)
            holder = self.file.read().strip()
            self.file.close()
            raise ConfigError(f"run_dir: {self.path.parent} is in use by another run: {holder}") from error
        self.file.truncate(0)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self.file.write(json.dumps({"pid": os.getpid(), "started": started, "command": Path(sys.argv[0]).name}))
        self.file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.urandom(4).hex()}-{os.getpid()}")


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
