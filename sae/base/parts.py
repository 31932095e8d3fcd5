"""A store that several jobs fill, each a part of it: which shards are whose, and whether all are there and go together.

    shards-03-of-16.jsonl     the journal of part 3, as that of any writer
    complete-03-of-16.json    written last: how many shards part 3 has, and a digest of what its journal says of them

Folders that were filled apart are merged by copying one into the other: no name in one means something else there.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.base.errors import ConfigError, DataError
from sae.base.files import read_json, write_json
from sae.base.store import Entry, Shards, file_name, journals

OPTION = "--shard"
_NAME = re.compile(r"(shards|complete)-(\d+)-of-(\d+)\.jsonl?")


@dataclass(frozen=True, order=True)
class Part:
    """One of several equal parts of a store, numbered from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Returns the part that is typed as 3/16; ConfigError for anything else."""
        typed = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        part = cls(int(typed[1]), int(typed[2])) if typed else cls(0)
        if not 1 <= part.number <= part.of:
            raise ConfigError(f"{OPTION}: {text!r} is not I/N with I from 1 to N, such as 3/16")
        return part

    def among(self, rank: int, world_size: int) -> "Part":
        """Returns the part of one of several processes that share this part: each has one of its own."""
        return Part((self.number - 1) * world_size + rank + 1, self.of * world_size)

    def shards(self, total: int) -> range:
        """Returns which of all shards are its own."""
        return range(self.number - 1, total, self.of)

    @property
    def name(self) -> str:
        """Returns what names its files, in their order."""
        return f"{self.number:0{len(str(self.of))}d}-of-{self.of}"

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def parts_in(folder: Path) -> tuple[set[Part], set[Part]]:
    """Returns (parts that are complete, by their own word; parts that have begun) of a store."""
    found: dict[str, set[Part]] = {"complete": set(), "shards": set()}
    for path in folder.glob("*-of-*.json*"):
        if match := _NAME.fullmatch(path.name):
            found[match[1]].add(Part(int(match[2]), int(match[3])))
    return found["complete"], found["shards"] | found["complete"]


def begin(folder: Path, kind: str, part: Part, total: int) -> bool:
    """Returns whether what a part holds must be looked through: it is marked as complete, with other shards.

    ConfigError if the store is made in another number of parts, DataError if a journal cannot be what it says.
    """
    others = {other.of for other in parts_in(folder)[1]} - {part.of}
    if others:
        n = min(others)
        raise ConfigError(
            f"{OPTION}: {part}, but {folder} is made in {n}; go on with {OPTION} I/{n}, or name another folder"
        )
    shards, mark = Shards(folder, kind, partial=True), _mark(folder, part)
    _check_journals(folder, shards, total)
    if not mark.exists() or _told(mark) == _marked(shards, part, total):
        return False
    mark.unlink()  # until it is so again
    return True


def complete(folder: Path, kind: str, part: Part, total: int) -> None:
    """Marks a part as complete; ValueError if it is not."""
    shards = Shards(folder, kind, partial=True)
    missing = _missing(shards, part, total)
    if missing:
        raise ValueError(f"{folder}: {part} cannot be complete: shards {missing[:5]} are not there")
    write_json(_mark(folder, part), _marked(shards, part, total))


def check_whole(folder: Path, kind: str, make: str) -> None:
    """Raises DataError naming the part and what to do, unless a store was not made in parts, or all of it is there.

    `make` is the command that makes a part, whose number is put behind it.
    """
    done, begun = parts_in(folder)
    if not begun:
        return
    of, *others = sorted({part.of for part in begun})
    if others:
        raise DataError(f"{folder}: holds shards of {of} and of {others[0]}; delete *-of-{of}.json*, or the others")
    every = [Part(number, of) for number in range(1, of + 1)]
    wanting = [part for part in every if part not in done]
    if wanting:
        listed = ", ".join(map(str, wanting[:8])) + (f" and {len(wanting) - 8} more" if len(wanting) > 8 else "")
        raise DataError(f"{folder}: not complete, shard {listed} is missing; make each: {make} {wanting[0]}")
    shards = Shards(folder, kind, partial=True)
    marks = {part: _told(_mark(folder, part)) for part in every}
    totals = [told.get("total", 0) for told in marks.values()]
    total = max(set(totals), key=totals.count)  # that of most, so that a foreign one is named
    _check_journals(folder, shards, total)
    for part, told in marks.items():
        if told == _marked(shards, part, total):
            continue
        missing = _missing(shards, part, total)
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = f"lacks {file_name(missing[0])}{more}" if missing else f"is not what {_mark(folder, part).name} tells"
        if told and (told.get("store"), told.get("total")) != (shards.key, total):
            what = "was made with other settings"
        raise DataError(f"{folder}: shard {part} {what}; make it again: {make} {part}")


def _check_journals(folder: Path, shards: Shards, total: int) -> None:
    """Raises DataError for what two journals list differently, or one lists of which it cannot be the journal."""
    seen: dict[int, tuple[Path, Entry]] = {}
    for path, entries in journals(folder, shards.key).items():
        match = _NAME.fullmatch(path.name)
        part = Part(int(match[2]), int(match[3])) if match else Part()
        for index, entry in entries.items():
            if index not in part.shards(total):
                whose = f"not of shard {part}" if match else f"beyond the last of {total}"
                raise DataError(f"{path}: lists {entry['file']}, which is {whose}; delete it and make the shard again")
            before, other = seen.setdefault(index, (path, entry))
            if other["sha256"] != entry["sha256"]:
                raise DataError(
                    f"{folder}: {before.name} and {path.name} list {entry['file']} with different digests; delete one "
                    "of them and make what it lists again"
                )


def _missing(shards: Shards, part: Part, total: int) -> list[int]:
    return [index for index in part.shards(total) if index not in shards]


def _told(mark: Path) -> dict[str, Any]:
    """What a mark says; nothing if it is damaged."""
    try:
        told = read_json(mark)
    except DataError:
        told = None
    return told if isinstance(told, dict) and isinstance(told.get("total"), int) else {}


def _marked(shards: Shards, part: Part, total: int) -> dict[str, Any]:
    own = [index for index in part.shards(total) if index in shards]
    lines = "".join(f"{index} {shards.entries[index]['sha256']}\n" for index in own)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return {"part": str(part), "total": total, "shards": len(own), "sha256": digest, "store": shards.key}


def _mark(folder: Path, part: Part) -> Path:
    return folder / f"complete-{part.name}.json"
