"""The table of released coders: names by which they are known, and where they lie.

`assets/releases.json` was derived by `tests/make/releases_table.py`; nothing of it was compared with the repositories
unless a row says `verified`. `sae.load` reads the files themselves, and refuses what does not fit.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any

from sae.assets import RELEASES
from sae.base.arguments import wrong
from sae.base.errors import ConfigError, nearest

LAYERS = (r"layers?[_.]?(\d+)", r"blocks\.(\d+)\.", r"(?:^|/)l(\d+)(?:r|a|m|tc)_", r"/(\d+)-")
WIDTHS = (r"width_(\d+[km])", r"width-2pow(\d+)", r"[-_]w?(\d+k)(?:[-_/]|$)", r"[-_](\d+x)(?:[-_/]|$)")


@dataclass(frozen=True)
class Release:
    """One released coder."""

    repo: str
    path: str
    """Folder or weight file in the repository; "" for all of it."""
    name: str = ""
    """Of the release, which is the first part of its address: "gemma-scope-2b-pt-res"."""
    id: str = ""
    """Among the coders of that release, the rest of its address."""
    model: str = ""
    """Hub id of the language model."""
    format: str = ""
    """Name of the format that it is expected in."""
    l0: float | None = None
    """Mean number of latents that fire at a token, as its publisher states it."""
    scale: float | None = None
    """Factor on its inputs, stated by SAELens."""
    neuronpedia: str | None = None
    """"model/source" on Neuronpedia."""
    verified: bool = False
    """Whether the real files have been loaded."""
    notes: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    """What SAELens sets over the coder's own config, in its terms."""

    @property
    def address(self) -> str:
        """Returns the name that `sae.load` takes."""
        return f"{self.name}/{self.id}" if self.id else self.name

    def hints(self) -> dict[str, Any]:
        """Returns what the table knows that files may be silent about, as `sae.untrusted.hints.Hints` calls it."""
        loaded = self.overrides.get("model_from_pretrained_kwargs", {})
        stated = {
            "model": self.model,
            "scale": self.scale,
            "processed": loaded.get("center_writing_weights"),
            "normalization": self.overrides.get("normalize_activations"),
        }
        return {name: value for name, value in stated.items() if value}


@dataclass(frozen=True)
class ReleaseSummary:
    """One release, summed up."""

    name: str
    repo: str
    model: str
    format: str
    coders: int | None
    """How many there are; None where nobody has listed them, and ids are paths in the repository."""
    layers: tuple[int, ...]
    widths: tuple[str, ...]
    """As the names say them: "16k", "2^14", or "8x" of expansion; () if they do not."""
    l0: tuple[float, float] | None
    """Least and most that is stated."""
    verified: bool
    notes: str


class Table:
    """The releases by name."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.source: dict[str, str] = data["source"]
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in data["releases"]}

    @cached_property
    def neuronpedia(self) -> dict[str, Release]:
        """Returns the coders that have a page on Neuronpedia by their address there."""
        found = (coder for row in self.rows.values() for coder in expand(row, "neuronpedia"))
        return {coder.neuronpedia: coder for coder in found if coder.neuronpedia}


@cache
def shipped_table() -> Table:
    """Returns the table that is shipped."""
    return Table(json.loads(RELEASES.read_text(encoding="utf-8")))


def expand(row: dict[str, Any], having: str = "id") -> Iterator[Release]:
    """Yields the coders of a release whose pattern has a field."""
    common = {f.name: row[f.name] for f in fields(Release) if f.name in row}
    common["notes"] = row.get("refused") or row.get("notes", "")
    for pattern in row.get("coders", ()):
        if having not in pattern:
            continue
        columns = [_column(column) for column in pattern.get("columns", ())]
        for i, values in enumerate(zip(*columns, strict=True) if columns else [()]):
            text = {name: pattern[name].format(*values) for name in ("id", "path", "neuronpedia") if name in pattern}
            numbers = {name: _number(pattern[name], i, values) for name in ("l0", "scale") if name in pattern}
            yield Release(**{"path": text["id"], **common, **text, **numbers})


def find_release(address: str) -> Release | None:
    """Returns the coder of a name: "release/sae_id", "release" if it has but one, or "model/source" of Neuronpedia.

    None if that is the name of neither. ConfigError if the release is known and the id is not, naming the nearest, and
    if the coder is one that cannot be carried.
    """
    first, _, rest = address.strip("/").partition("/")
    row = shipped_table().rows.get(first)
    if row is None:
        found = shipped_table().neuronpedia.get(address)
        if found is None and first in {name.partition("/")[0] for name in shipped_table().neuronpedia}:
            raise ConfigError(f"path: no source {rest!r} of {first}.{nearest(address, shipped_table().neuronpedia, 3)}")
        row = shipped_table().rows[found.name] if found else {}
    elif "coders" not in row:
        found = Release(**{f.name: row[f.name] for f in fields(Release) if f.name in row}, path=rest, id=rest)
    else:
        found = _one_of(row, rest)
    if found is not None and "refused" in row:
        raise ConfigError(f"path: {found.address} is refused: {row['refused']}")
    return found


def coders_of(name: str) -> list[Release]:
    """Returns the coders of a release that are listed; ConfigError if there is no release of that name."""
    if name not in shipped_table().rows:
        raise ConfigError(f"path: no release {name!r}.{nearest(name, names())}")
    return list(expand(shipped_table().rows[name]))


def release_at(repo: str, path: str) -> Release | None:
    """Returns what the table says of the coder at a path of a repository (its folder or weight file), None if nothing.

    The repository may also be a folder that holds it by its whole name, as `sae-load fetch --to` makes them. Where a
    coder has several names, that of its page on Neuronpedia comes first.
    """
    found = []
    for row in shipped_table().rows.values():
        inside = f"/{repo}/{path}/".partition(f"/{row['repo']}/")[2]
        if inside and "refused" not in row:
            found += [coder for coder in expand(row) if coder.path and inside.startswith(f"{coder.path}/")]
    longest = [coder for coder in found if len(coder.path) == max(len(other.path) for other in found)]
    return max(longest, key=lambda coder: coder.neuronpedia is not None) if longest else None


def names() -> list[str]:
    """Returns the names of all releases."""
    return list(shipped_table().rows)


def repositories() -> list[str]:
    """Returns the repositories that the releases lie in."""
    return sorted({row["repo"] for row in shipped_table().rows.values()})


def list_released(model: str | None = None, release: str | None = None) -> list[ReleaseSummary]:
    """Returns all releases, or those of a language model and of a name, sorted by model and name.

    A model is named by its hub id or the end of it, or else by any part: "gemma" is all of them; so is a release.
    ConfigError with the nearest if there is none.
    """
    rows = list(shipped_table().rows.values())
    for what, typed, key in (("model", model, "model"), ("release", release, "name")):
        if not isinstance(typed, str | None):
            raise wrong(what, typed, "a name, or a part of one")
        if typed is not None:
            known = sorted({row[key] for row in rows})
            meant = _meant(known, typed)
            if not meant:
                near = nearest(typed, [*known, *(name.rpartition("/")[2] for name in known)], 3)
                raise ConfigError(f"{what}: no coder of {typed!r} is known.{near}")
            rows = [row for row in rows if row[key] in meant]
    return sorted((_summed_up(row) for row in rows), key=lambda listed: (listed.model, listed.name))


def _meant(known: list[str], typed: str) -> list[str]:
    """Returns the names that are what was typed, or end in it behind a slash; else those that it is part of.

    If there is none, what stands between letters and figures does not count: "Gemma2" and "gemma 2" are gemma-2.
    """
    part = typed.lower()
    whole = [name for name in known if part in (name.lower(), name.lower().rpartition("/")[2])]
    found = whole or [name for name in known if part and part in name.lower()]
    plain = re.sub(r"[^a-z0-9]", "", part)
    return found or [name for name in known if plain and plain in re.sub(r"[^a-z0-9]", "", name.lower())]


def _summed_up(row: dict[str, Any]) -> ReleaseSummary:
    found = list(expand(row))
    texts = [f"{coder.id}/{coder.path}/{coder.neuronpedia or ''}/{row['repo']}" for coder in found] or [row["repo"]]
    layers = {int(layer) for text in texts for layer in _first(LAYERS, text)}
    widths = {width.lower() for text in texts for width in _first(WIDTHS, text)}
    l0 = [coder.l0 for coder in found if coder.l0 is not None]
    return ReleaseSummary(
        row["name"],
        row["repo"],
        row["model"],
        row["format"],
        len(found) if "coders" in row else None,
        tuple(sorted(layers)),
        tuple(sorted((f"2^{w}" if w.isdigit() else w for w in widths), key=_size)),
        (min(l0), max(l0)) if l0 else None,
        row["verified"],
        row.get("refused") or row.get("notes", ""),
    )


def _one_of(row: dict[str, Any], rest: str) -> Release:
    found = {coder.id: coder for coder in expand(row)}
    if rest in found or (not rest and len(found) == 1):
        return found[rest] if rest else next(iter(found.values()))
    what = f"has no coder {rest!r}" if rest else f"has {len(found)} coders"
    close = nearest(rest, found, 3) or f" It has: {', '.join(list(found)[:4])}{', ...' if len(found) > 4 else ''}"
    raise ConfigError(f"path: the release {row['name']} {what}.{close}")


def _first(patterns: tuple[str, ...], text: str) -> list[str]:
    """Returns what the first pattern that fits says."""
    return next(([found[1]] for pattern in patterns if (found := re.search(pattern, text, re.IGNORECASE))), [])


def _size(width: str) -> tuple[bool, float]:
    number = float(re.sub(r"\D", "", width.removeprefix("2^")))
    return width.endswith("x"), 2**number if width.startswith("2^") else number * {"k": 1e3, "m": 1e6}.get(width[-1], 1)


def _column(column: Any) -> list[Any]:
    if isinstance(column, str):
        first, last = column.split("-")
        return list(range(int(first), int(last) + 1))
    return column


def _number(value: Any, i: int, values: tuple[Any, ...]) -> float:
    if isinstance(value, str):
        return float(value.format(*values))
    return float(value[i] if isinstance(value, list) else value)
