"""Which latents are meant: by what is typed in a shell and in a config, and by what Python has for several numbers."""

import os
import re
from collections.abc import Collection, Iterable
from operator import index
from pathlib import Path
from typing import Any

from sae.base.arguments import plain
from sae.base.errors import ConfigError, nearest
from sae.base.lines import decoded

ALLOWED = "an id, several (a list, set, range, slice, array or mask), a file of them, 'random:100', 'alive' or 'all'"
_NO_NUMBER: Any = None


def named_latents(given: Any, d_sae: int) -> str:
    """Returns latents as a config names them, given any value that stands for some in Python.

    That is text as typed, an id, or several: in anything that can be gone through, as a slice of all ids, or as a mask
    of all latents. TypeError for what is none of these.
    """
    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    values = range(d_sae)[given] if isinstance(given, slice) else given
    if isinstance(values, range) and values.step == 1 and values:
        return f"{values[0]}-{values[-1]}"
    values = plain(values)
    if not isinstance(values, Iterable) or isinstance(values, bytes | dict):
        return _word(values)
    several = [plain(value) for value in values]  # of sets, too
    if several and all(isinstance(value, bool) for value in several):
        if len(several) != d_sae:
            raise ConfigError(f"latents: a mask of {len(several)} latents; the coder has {d_sae}")
        several = [place for place, meant in enumerate(several) if meant]
    return ",".join(map(_word, several))


def is_one(given: Any) -> bool:
    """Returns whether a value stands for a single latent: a number, or the text of one."""
    value = plain(given)
    return value.strip().isdecimal() if isinstance(value, str) else isinstance(value, int)


def ids_among(there: Collection[int], given: Any, d_sae: int) -> list[int]:
    """Returns the ids that a value stands for, ascending; of a slice those that are there.

    ConfigError unless it names latents one by one, and the coder has them.
    """
    if isinstance(given, slice):
        return sorted(latent for latent in there if latent in range(d_sae)[given])
    found = asked_latents(named_latents(given, d_sae), d_sae)
    if not isinstance(found, list):
        raise ConfigError(f"latents: {given!r} names no latent; give ids, such as 508 or 40-49")
    return found


def _word(value: Any) -> str:
    """Returns an id as text."""
    if isinstance(value, str):
        return value
    try:
        return str(index(_NO_NUMBER if isinstance(value, bool) else value))
    except TypeError:
        raise TypeError(f"latents: {value!r} is no latent id; allowed: {ALLOWED}") from None


def asked_latents(typed: str | int, d_sae: int) -> list[int] | int | str:
    """Returns what was typed for latents: ids, ascending, a number of alive ones to draw, or "alive".

    Typed are "alive", "all", "random:" and a number, ids and ranges ("508", "3,17,40-49"), or a file of ids.
    ConfigError tells what is none of these, out of range, or there twice.
    """
    typed = str(typed).strip()
    if typed == "alive":
        return typed
    if typed == "all":
        return list(range(d_sae))
    kind, colon, count = typed.partition(":")
    if kind.strip() == "random" and (colon or not Path(typed).is_file()):
        if not count.strip().isdecimal() or not _number(count.strip()):
            raise ConfigError(f"latents: {typed!r} says no number of latents; give at least 1, for example random:100")
        return _number(count.strip())
    ids: set[int] = set()
    for word in re.findall(r"[^\s,[\]]+", _told(typed)):  # a list of a config or a JSON file has brackets
        first, dash, last = word.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(
                f"latents: {word!r} is no latent id or range, nor a file; allowed: ids (508 or 3,17,40-49), a file of "
                f"ids, random:100, alive, all.{nearest(word, ('alive', 'all', 'random:100'))}"
            )
        low, high = _number(first), _number(last or first)
        if low > high:
            raise ConfigError(f"latents: {word!r} is no range; its end comes before its beginning")
        if high >= d_sae:
            raise ConfigError(f"latents: {word[:40]} is out of range; the coder has latents 0 to {d_sae - 1}")
        twice = ids & set(range(low, high + 1))
        if twice:
            raise ConfigError(f"latents: {min(twice)} is there twice")
        ids |= set(range(low, high + 1))
    if not ids:
        raise ConfigError(f"latents: none given; the coder has latents 0 to {d_sae - 1}")
    return sorted(ids)


def spelled_out(asked: list[int] | int | str) -> str:
    """Returns what `asked_latents` found as text that says the same, whatever becomes of a file: never a bare number,
    which in the config of an older run is one of latents at random.
    """
    if isinstance(asked, str):
        return asked
    if isinstance(asked, int):
        return f"random:{asked}"
    return f"{asked[0]}," if len(asked) == 1 else ",".join(map(str, asked))


def _told(typed: str) -> str:
    """Returns what a file of ids holds, or what was typed where that names no file, or is ids whatever lies here."""
    if re.fullmatch(r"[\d\s,-]*", typed):
        return typed
    try:
        path = Path(typed).expanduser()
        return decoded(path.read_bytes()) if path.is_file() else typed
    except UnicodeDecodeError as error:
        raise ConfigError(f"latents: {typed} is no text file of ids: {error}") from error
    except (OSError, ValueError):  # too long for a name: ids
        return typed


def _number(digits: str) -> int:
    """Returns a number; of more digits than any id has, one that is out of range."""
    return int(digits) if len(digits) < 19 else 2**62
