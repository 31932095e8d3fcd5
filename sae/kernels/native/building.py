"""Builds the kernels with the machine's own compiler, once for each of source, compiler and kind of CPU."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

from sae.base.errors import ConfigError
from sae.base.files import cache_dir, made_once
from sae.base.progress import UNWATCHED

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math")
NATIVE = ("-march=native", "-mcpu=native")  # the first that the compiler knows here
LIBRARY = "kernels.so"


class Unavailable(Exception):
    """Why there are no native kernels, in one line."""


@cache
def library() -> ctypes.CDLL | Unavailable:
    """Returns the kernels, built now if they have not been on such a machine, or why there are none."""
    try:
        return _loaded()
    except Unavailable as reason:
        return reason
    except (OSError, ConfigError) as error:
        return Unavailable(str(error))


def _loaded() -> ctypes.CDLL:
    if os.name == "nt":
        raise Unavailable("they are not built on Windows")
    command, target = _targeted(_compiler())
    sources = [path.read_bytes() for path in sorted(SOURCE.parent.glob("*.[ch]pp"))]
    key = hashlib.sha256(b"\0".join([*sources, " ".join(command).encode(), target])).hexdigest()[:24]
    given = os.environ.get("TORCH_EXTENSIONS_DIR")  # where torch's own compiled extensions lie, if anybody says so
    folder = (Path(given).expanduser() / "sae-interp" if given else cache_dir() / "native") / key
    made_once(folder, lambda draft: _run([*command, "-o", str(draft / LIBRARY), str(SOURCE), "-ldl"]), UNWATCHED)
    return ctypes.CDLL(str(folder / LIBRARY))


def _compiler() -> list[str]:
    """Returns the words that call the compiler: those of $CXX, else the first that is found."""
    named = os.environ.get("CXX", "").split()
    for words in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(words[0]):
            return words
    raise Unavailable(
        f"no C++ compiler was found ({' '.join(named) or ', '.join(COMPILERS)}): install g++, "
        "by `apt install g++`, `dnf install gcc-c++` or `conda install -c conda-forge cxx-compiler`"
    )


def _targeted(compiler: list[str]) -> tuple[list[str], bytes]:
    """Returns a command for this CPU, and all that it predefines: its version and the instructions that it may use.

    So a cache that different machines share holds a build for each kind of them.
    """
    program = [word for word in compiler if not word.startswith("-")]
    own = compiler[len(program) :]  # they come last, where they win
    for native in NATIVE:
        with suppress(Unavailable):
            return _described([*program, *FLAGS, native, *own])
    return _described([*program, *FLAGS, *own])


def _described(command: list[str]) -> tuple[list[str], bytes]:
    return command, _run([*command, "-E", "-dM", "-x", "c++", os.devnull])


def _run(command: list[str]) -> bytes:
    """Returns what a compiler prints; Unavailable with its first complaint if it fails."""
    done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.decode(errors="replace").splitlines()
        complaint = next((line for line in said if "error" in line), said[0] if said else "without a word")
        raise Unavailable(f"{command[0]} fails: {complaint.strip()}")
    return done.stdout
