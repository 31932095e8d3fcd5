r"""Formats: how coders lie on disk. One format a file, found by being there.

Each module has

    WEIGHTS   a regular expression on the whole name of its weight file: "params\\.npz"
    detect(place) -> bool               by configs, tensor names and shapes; no tensor is read
    read(place) -> (spec, tensors)      in this toolkit's terms (`sae/coder/spec.py`); no fold, no guess

and those that can be written `write(folder, coder)`. What a file is silent about, `read` asks of the user by
`place.required_hint`; what it does not know it refuses, naming the field or tensor.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import ModuleType

from torch import Tensor

from sae.base.errors import ConfigError, DataError, nearest
from sae.base.plugins import discover
from sae.coder.spec import CoderSpec
from sae.lm.sites import parse_pair, parse_site
from sae.untrusted.damage import printable
from sae.untrusted.files import Files
from sae.untrusted.hints import Hints
from sae.untrusted.places import Place

NATIVE = "native"  # the name of our own format


@cache
def formats() -> dict[str, ModuleType]:
    """Returns {name: module} of all formats."""
    return discover(__name__, __path__)


def candidates(files: Files, below: str = "", hints: Hints | None = None) -> list[Place]:
    """Returns the weight files at or below a folder (or that one file) whose names are those of a format, sorted."""
    patterns = [re.compile(module.WEIGHTS) for module in formats().values()]
    start = f"{below}/" if below else ""
    names = [name for name in files.names() if name == below or name.startswith(start)]
    found = [name for name in names if any(p.fullmatch(name.rpartition("/")[2]) for p in patterns)]
    return [Place(files, name, hints or Hints()) for name in sorted(found)]


def formats_of(place: Place) -> list[str]:
    """Returns the names of the formats that a place may be in: the one asked for, or all that recognize it."""
    asked = place.hints.format
    if asked is not None:
        if asked not in formats():
            raise ConfigError(f"format: {asked!r} is not one of {', '.join(formats())}.{nearest(asked, formats())}")
        if not re.fullmatch(formats()[asked].WEIGHTS, place.name):
            raise ConfigError(f"format: {place} is no file of {asked}, which are named {formats()[asked].WEIGHTS}")
        return [asked]
    fitting = {n: m for n, m in formats().items() if re.fullmatch(m.WEIGHTS, place.name)}
    found = []
    for name, module in fitting.items():
        with _naming_breakage(place, name):
            if module.detect(place):
                found.append(name)
    return found


def read(place: Place) -> tuple[str, CoderSpec, dict[str, Tensor]]:
    """Returns (format, spec, tensors) of a place; ConfigError if it is in no known format, or may be in several."""
    found = formats_of(place)
    if len(found) > 1:
        raise ConfigError(f"format: {place} may be {' or '.join(found)}; say which with format=")
    if not found:
        shapes = place.shapes()
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:6])
        raise ConfigError(f"path: {place} is in no known format; it holds {listed or 'no tensors'}")
    with _naming_breakage(place, found[0]):
        spec, tensors = formats()[found[0]].read(place)
    for opened in place.opened:
        opened.refuse_unused()
    return found[0], _with_hinted_sites(spec, place), tensors


def _with_hinted_sites(spec: CoderSpec, place: Place) -> CoderSpec:
    """Returns the spec with the sites and the model that the user says, where the format has not asked for them."""
    said, model = place.hints.site, place.hints.model
    if said is not None and "site" not in place.hints_read:
        if max(len(spec.reads), len(spec.writes)) > 1:
            raise ConfigError(f"site: {place} is of several sites, which its files name; leave it out")
        spec = _at_site(spec, said, place)
    if model is not None:
        reads, writes = (
            tuple(site if site.tag else replace(site, model=model) for site in sites)
            for sites in (spec.reads, spec.writes)
        )
        spec = spec.with_(reads=reads, writes=writes)
    return spec


def _at_site(spec: CoderSpec, said: str, place: Place) -> CoderSpec:
    """Returns the spec of a coder of one site read and one written where the user says; what it is stays."""
    known = next((site.model for site in spec.reads), "")
    if "->" in said:
        if spec.reads and spec.is_autoencoder:
            raise ConfigError(f"site: {said!r} is of a transcoder, but {place} is an autoencoder")
        reads, writes = parse_pair(said, known)
    else:
        reads = (parse_site(said, known),)
        writes = reads if spec.is_autoencoder else spec.writes
        if not all(site.hook for site in writes) or not writes:
            raise ConfigError(f"site: {said!r} is where {place} reads; it writes elsewhere: say READ->WRITTEN")
    return spec.with_(reads=reads, writes=writes)


@contextmanager
def _naming_breakage(place: Place, name: str) -> Iterator[None]:
    """Makes whatever breaks a reader that takes a file for what it is not, such as a matrix for a bias, a DataError."""
    try:
        yield
    except (ConfigError, DataError, OSError, MemoryError):
        raise
    except Exception as error:
        why = printable(f"{type(error).__name__}: {error}")
        raise DataError(f"{place} is damaged, or no {name} coder as they are known: {why}") from error
