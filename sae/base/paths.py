"""Paths as people type them: whether two are one place, what is meant by one where nothing is, and what moved along."""

import os
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sae.base.errors import ConfigError

RUNS = "runs"  # where runs lie that are named by no folder
CACHED = "models--"  # how a folder of a model begins in the cache of the hub


def same_place(a: str | Path, b: str | Path) -> bool:
    """Returns whether two names are one, or lead to the same file or folder: `a/`, `./a`, `~/a` and links to it."""
    if str(a) == str(b):
        return True
    try:
        return os.path.samefile(Path(a).expanduser(), Path(b).expanduser())
    except (OSError, ValueError, RuntimeError):
        return False


def can_only_be_local(typed: str) -> bool:
    """Returns whether a name is a path of this machine, whatever is there: absolute, from here or home, of runs/, or
    below a folder that is here.
    """
    path = Path(typed).expanduser()
    first = path.parts[0] if len(path.parts) > 1 else ""
    return path.is_absolute() or typed.startswith((".", "~")) or first == RUNS or Path(first or "/nowhere").is_dir()


def told_elsewhere(path: str) -> str:
    """Returns a path as a page has it that others may see: of one from the root or home, its last two parts alone."""
    if not Path(path).is_absolute() and not path.startswith("~"):
        return path
    return "/".join(part for part in Path(path).parts[-2:] if part not in (os.sep, "~"))


def without_places(value: Any) -> Any:
    """Returns a setting, or a tree of them, as others may see it: each text as `told_elsewhere` has it."""
    if isinstance(value, str):
        return told_elsewhere(value)
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    return {key: without_places(item) for key, item in value.items()} if isinstance(value, dict) else value


def model_elsewhere(model: str) -> str:
    """Returns what others may call a model: one of a folder of this machine by that folder's name, without where it
    lies; one in the cache of the hub by its id there.
    """
    local = Path(model).expanduser()
    if not (local.is_absolute() or model.startswith((".", "~")) or local.exists()):
        return model
    parts = local.resolve().parts
    cached = [part.removeprefix(CACHED) for part in parts if part.startswith(CACHED)]
    return cached[-1].replace("--", "/") if cached else local.resolve().name


def near(typed: str | Path, folders: bool = False) -> str:
    """Returns " Did you mean 'a'?" with what is most like a path that is not there, "" if nothing is.

    With `folders`, that is a folder. The first of its parts that is not there is compared with what lies in its place;
    that is a name if it is the last.
    """
    there = Path()
    parts = Path(typed).parts
    for i, part in enumerate(parts):
        at = (there / part).expanduser()
        if os.path.lexists(at):
            there /= part
            continue
        folder = there.expanduser()
        names = [path.name for path in folder.iterdir()] if folder.is_dir() and os.access(folder, os.R_OK) else []
        for name in get_close_matches(part, names, n=3, cutoff=0.5):
            found = there.joinpath(name, *parts[i + 1 :])
            if found.expanduser().is_dir() or (found.expanduser().exists() and not folders):
                return f" Did you mean {(name if i + 1 == len(parts) else str(found))!r}?"
        return ""
    return ""


def moved_along(path: str, then: str, now: str | Path) -> str:
    """Returns where something lies of which a folder tells that has been moved, or is seen from elsewhere.

    The folder was called `then` when it wrote down `path`; what lies where `path` did as seen from there is it. `path`
    as it stands if there is nothing.
    """
    if not path or not then or Path(path).expanduser().is_absolute() != Path(then).expanduser().is_absolute():
        return path
    from_there = os.path.relpath(Path(path).expanduser(), Path(then).expanduser())
    beside = Path(os.path.normpath(Path(now).expanduser() / from_there))
    return str(beside) if beside.exists() and not same_place(path, beside) else path


def from_anywhere(typed: str) -> str:
    """Returns the absolute path of what is here by a name, which leads to it from any folder; other names as typed."""
    path = Path(typed).expanduser()
    return str(path.absolute()) if typed and path.exists() else typed


def check_file(path: Path, field: str, usual: str = "figures.json") -> None:
    """Raises ConfigError naming the setting `field` if no file can be written by a name."""
    if path.is_dir():
        raise ConfigError(f"{field}: {path} is a folder; name a file, such as {path / usual}")
    check_writable(path.parent, field)


def check_writable(folder: Path, field: str) -> None:
    """Raises ConfigError naming the setting `field` if nothing can be written to a folder, or it cannot be made.

    It is not made: whatever else is wrong with a command, it leaves nothing.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{field}: cannot write to {folder}: {error.strerror}; choose another folder") from error


def explained_below(folder: Path) -> list[Path]:
    """Returns the folders of the explained runs in that of a coder, or of a run with those of its coders, sorted."""
    patterns = ("explain*/**/shards", "coders/**/explain*/**/shards")
    return sorted(path.parent for pattern in patterns for path in folder.glob(pattern) if path.is_dir())
