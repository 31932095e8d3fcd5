"""Files that are either whole or absent: the only place that renames files.

What is written goes first to a hidden temporary sibling, is flushed to disk, and takes its final name by one rename:
a crash, a full disk or a kill at any moment leaves the old file or the new one. A temporary names the process that
made it, so that what a dead process left behind can be told from work in progress.
"""

import errno
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import lock_descriptor
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sae.base.errors import ConfigError, DataError
from sae.base.progress import Watch
from sae.base.tensorfile import write_tensors

log = logging.getLogger(__name__)

MANIFEST, MARKER, LOCK = "manifest.json", "COMPLETE", ".lock"
ABANDONED_AFTER_S = 24 * 3600  # for temporaries of other machines, whose processes cannot be asked

_WINDOWS = os.name == "nt"
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_LAUNCH = secrets.token_hex(4)  # tells this process from an earlier one that had the same id
_COUNTER = itertools.count()
_TEMP_NAME = re.compile(r"\.tmp-(\w+)-(\d{1,9})-(\w+)-(?:\d{6}-)?")  # host, process id, launch


def cache_dir() -> Path:
    """Returns the folder for what can be made again, which may not exist yet.

    It is $SAE_CACHE, else sae-interp in $XDG_CACHE_HOME, else in ~/.cache; a relative path in $XDG_CACHE_HOME is none.
    """
    if own := os.environ.get("SAE_CACHE"):
        return Path(own).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", "")).expanduser()
    return (shared if shared.is_absolute() else Path("~/.cache").expanduser()) / "sae-interp"


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Writes a file (text as UTF-8) whole or not at all, and the folders above; OSError names the path and reason."""
    with replacing(path) as draft:
        draft.write_bytes(data.encode() if isinstance(data, str) else data)


def write_whole(path: Path | str, write: Callable[[Path], Any]) -> None:
    """Writes a file whole or not at all by what writes it to a path that it is given; OSError names path and reason."""
    with replacing(path) as draft:
        write(draft)


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yields the path of a file to write, which takes the name `path` once it is on disk; if the block raises, not."""
    path = Path(path)
    folder = temp_beside(path)  # not a file: who writes may make a temporary beside it
    try:
        with explained(path):
            folder.mkdir(parents=True)
            yield folder / path.name
            _open_to_others(folder, [folder / path.name])
            sync(folder / path.name)
            os.replace(folder / path.name, path)
            sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def append(path: Path | str, text: str) -> None:
    """Adds text to the end of a file; OSError names the path and reason."""
    with explained(Path(path)), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_json(path: Path | str, obj: Any) -> None:
    """Writes an object as JSON, keys sorted, whole or not at all; ValueError for NaN, infinity and the like."""
    try:
        text = json.dumps(obj, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"cannot write {path}: {error}") from error
    atomic_write(path, text + "\n")


def read_json(path: Path | str) -> Any:
    """Returns what a JSON file holds; DataError names the file if it is missing or broken."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def typed_command() -> list[str]:
    """Returns the command that was typed, for files to tell: addresses in it have no user, password and query."""

    def told(word: str) -> str:
        if not any(mark in word for mark in "?@"):
            return word
        word = re.sub(r"://[^/?]*@", "://***@", word)
        return re.sub(r"\?.*?(?=\s*,\s*\w+://|[\]\"']*$)", "?***", word)  # up to the next address, or the end

    return [Path(sys.argv[0]).name, *map(told, sys.argv[1:])]


def save_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Writes a safetensors file whole or not at all, and returns its size and digest, {"bytes", "sha256"}.

    Equal tensors and metadata give equal bytes.
    """
    with replacing(path) as draft:
        return write_tensors(draft, tensors, metadata)


def load_tensors(path: Path | str, device: str = "cpu") -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, memory-mapped on the CPU; DataError names the file if it is broken."""
    try:
        return load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is missing, damaged or no safetensors file: {error}") from error


def tensors_metadata(path: Path | str) -> dict[str, str]:
    """Returns the text that a safetensors file holds beside its tensors; DataError names the file if it is broken."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is missing, damaged or no safetensors file: {error}") from error


def sha256_file(path: Path | str) -> str:
    """Returns the 64 hex digits of a file's sha256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_join(root: Path | str, *parts: str) -> Path:
    """Returns root/part/...; DataError if that is absolute, climbs with "..", or leaves `root` through a link."""
    path = Path(root).joinpath(*parts)
    names = [name for part in parts for name in re.split(r"[/\\]", part)]
    inside = not any(Path(part).is_absolute() for part in parts) and ".." not in names and "\0" not in "".join(parts)
    if not inside or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise DataError(f"{'/'.join(parts)!r} is refused: it points outside of {root}")
    return path


@contextmanager
def publish(folder: Path | str, known: dict[str, dict[str, Any]] | None = None) -> Iterator[Path]:
    """Yields a temporary folder to fill; at the end it gets a manifest and a marker, and takes the name `folder`.

    `known` are sizes and digests by file name, as `write_tensors` returns them, which may be filled in by the block:
    such files are not read again.

    If the block raises, nothing is left. FileExistsError if there is something of that name already; but if another
    process published the same folder meanwhile, theirs stays and ours goes.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, f"{folder} exists already; delete it or choose another name")
    temp = temp_beside(folder)
    with explained(folder):
        temp.mkdir(parents=True)
    try:
        yield temp
        with explained(folder):
            _seal(temp, known or {})
            try:
                if _WINDOWS and folder.exists():
                    folder.rmdir()  # it is empty; elsewhere it is replaced
                os.rename(temp, folder)
            except OSError:
                if not is_complete(folder):
                    raise
            sync(folder.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def made_once(folder: Path, fill: Callable[[Path], Any], watch: Watch) -> None:
    """Has `folder` made by `fill(draft)` unless it is whole already; another process that makes it is waited for.

    Stopped if asked to stop while waiting; whatever `fill` raises leaves nothing behind.
    """
    if watch.repair and folder.exists():
        try:
            verify(folder)
        except DataError as error:
            log.warning("made again: %s", error)
            shutil.rmtree(folder)
    if not is_complete(folder):
        with FolderLock(folder.parent / ".locks" / folder.name, watch):
            remove_stale(folder.parent)
            if not is_complete(folder):
                with publish(folder) as draft:
                    fill(draft)


def is_complete(folder: Path | str) -> bool:
    """Returns whether a folder was published to the end. It does not read the files: that is `verify`."""
    return Path(folder, MARKER).is_file() and Path(folder, MANIFEST).is_file()


def verify(folder: Path | str) -> None:
    """Raises DataError naming the first file that is damaged, missing or extra; hidden files do not count."""
    folder = Path(folder)
    if not is_complete(folder):
        raise DataError(f"{folder} is incomplete: it has no {MARKER}; delete it and run again")
    if (folder / MARKER).read_text(encoding="utf-8", errors="replace").strip() != sha256_file(folder / MANIFEST):
        raise DataError(f"{folder / MANIFEST} is damaged: its sha256 differs from the one in {MARKER}")
    recorded, present = read_json(folder / MANIFEST)["files"], _files(folder)
    for name in sorted(recorded.keys() ^ present.keys()):
        raise DataError(f"{folder / name} {'is missing' if name in recorded else 'does not belong there'}")
    for name, path in present.items():
        if recorded[name] != _described(path):
            raise DataError(f"{path} is damaged: its size or sha256 differs from {MANIFEST}")


def remove_stale(parent: Path | str) -> list[Path]:
    """Removes temporaries that dead processes left directly in `parent` and returns them; live ones stay."""
    matches = [(temp, _TEMP_NAME.match(temp.name)) for temp in sorted(Path(parent).glob(".tmp-*"))]
    stale = [temp for temp, match in matches if match and _is_abandoned(temp, *match.groups())]
    for temp in stale:
        shutil.rmtree(temp, ignore_errors=True)
    return stale


class FolderLock:
    """Holds a folder for one process at a time, inside a `with` block; a crash of the holder frees it.

    The folder is made if need be, and goes again if nothing was put into it; ConfigError if it cannot be written to. A
    second holder gets a ConfigError at once, with the first one's process id and start; given a watch, it waits, and
    raises Stopped when asked to stop.
    """

    def __init__(self, folder: Path | str, watch: Watch | None = None) -> None:
        self.folder, self.watch = Path(folder), watch

    def __enter__(self) -> "FolderLock":
        self._open()
        try:  # the lock is the kernel's; what its file says is only there to name the holder
            while not self._try():
                if self.watch is None:
                    raise ConfigError(f"{self.folder} is in use by {self._holder()}; wait for it or use another folder")
                self.watch.poll(f"while waiting for {self._holder()}, which uses {self.folder}")
                time.sleep(0.2)
            command = " ".join(typed_command())
            started = datetime.now(UTC).isoformat(timespec="seconds")
            with explained(self.folder / LOCK):
                self._file.truncate(0)
                self._file.write(json.dumps({"pid": os.getpid(), "started": started, "command": command}))
                self._file.flush()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if _WINDOWS:
            self._file.close()  # there, what is open cannot be removed, by others neither
        with suppress(OSError):
            if self._made and os.listdir(self.folder) == [LOCK]:
                (self.folder / LOCK).unlink()
                for folder in self._made:
                    folder.rmdir()
        self._file.close()  # frees the lock

    def _open(self, tries: int = 3) -> None:
        """Opens the lock's file, in a folder that may have to be made."""
        folders = [self.folder, *self.folder.parents]
        self._made = [folder for folder in folders if not os.path.lexists(folder)]  # the innermost first
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 held until the end
        except OSError as error:
            if isinstance(error, FileNotFoundError) and tries:  # another holder has taken it away between the two
                return self._open(tries - 1)
            raise ConfigError(f"cannot write to {self.folder}: {error.strerror}; choose another folder") from error

    def _try(self) -> bool:
        try:
            if not lock_descriptor(self._file.fileno(), blocking=False):
                return False
        except OSError as error:  # some network file systems have no locks at all
            log.warning("%s cannot be locked (%s): two runs on it would go unnoticed", self.folder, error.strerror)
            return True
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.folder / LOCK)):
                return True
        self._file.close()  # of a holder that has taken the file away with the folder
        self._open()
        return self._try()

    def _holder(self) -> str:
        with suppress(OSError, ValueError, KeyError, TypeError):  # read in the instant before it is written
            with open(self.folder / LOCK, "rb", buffering=0) as file:
                file.seek(1)  # Windows keeps the first byte, which is locked, from readers; it is a bracket
                holder = json.loads(b"{" + file.readall())
            return f"process {holder['pid']} (started {holder['started']}: {holder['command']})"
        return "another process"


def temp_beside(path: Path) -> Path:
    """Returns a name beside a path for what goes with this process: `remove_stale` knows it by that."""
    return path.with_name(f".tmp-{_HOST}-{os.getpid()}-{_LAUNCH}-{next(_COUNTER):06d}-{path.name}")


def _is_abandoned(temp: Path, host: str, pid: str, launch: str) -> bool:
    if host == _HOST:
        return launch != _LAUNCH if int(pid) == os.getpid() else not psutil.pid_exists(int(pid))
    with suppress(PermissionError, FileNotFoundError):  # of someone else, or gone by now
        return time.time() - temp.stat().st_mtime > ABANDONED_AFTER_S
    return False


def _open_to_others(folder: Path, files: Iterable[Path]) -> None:
    """Gives files the mode of any file that is made in a folder: some libraries make theirs for the owner alone.

    That mode is seen on one, not computed: no thread can ask for the umask without changing it for all of them, and a
    folder may have access lists of its own.
    """
    plain = folder / ".mode"
    plain.touch()
    mode = plain.stat().st_mode
    plain.unlink()
    for file in files:
        if file.stat().st_mode != mode:
            file.chmod(stat.S_IMODE(mode))


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Makes an operating system's error one line that names path and reason, if it is none; errno and class stay."""
    try:
        yield
    except OSError as error:
        told, name = str(error.strerror or error), _TEMP_NAME.sub("", str(path))  # as it is to be called
        told = told if told.startswith("cannot write ") else f"cannot write {name}: {told}"
        raise OSError(error.errno or errno.EIO, told) from error


def sync(path: Path) -> None:
    """Flushes a file, which Windows wants open for writing, or a folder, where there is such a thing, to disk."""
    if _WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not path.is_dir():  # some network disks
            raise
    finally:
        os.close(descriptor)


def _files(folder: Path) -> dict[str, Path]:
    """The files below a folder by relative name, without hidden ones and what describes them."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {n: p for n, p in found.items() if not n.startswith(".") and "/." not in n and n not in (MANIFEST, MARKER)}


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _seal(folder: Path, known: dict[str, dict[str, Any]]) -> None:
    """Writes manifest and marker, and flushes the whole tree to disk."""
    files = {name: known.get(name) or _described(path) for name, path in _files(folder).items()}
    for name, told in known.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != told["bytes"]:
            raise OSError(errno.EIO, f"{name} is not as it was written")
    write_json(folder / MANIFEST, {"version": 1, "files": files})
    inside = list(folder.rglob("*"))
    _open_to_others(folder, filter(Path.is_file, inside))
    for path in inside:
        sync(path)
    atomic_write(folder / MARKER, sha256_file(folder / MANIFEST) + "\n")
