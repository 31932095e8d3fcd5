"""What a coder is, from configs and the headers of weight files alone: nothing else is read, and nothing else fetched.

Its format is asked to read it as ever, with stand-ins for the tensors of files that are not on this disk: tensors
without values or, for what looks at thresholds and factors, vectors of ones. Where that is not enough, because a single
number lies among the weights or because the file has no header, the spec is not known before the file is fetched.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sae import formats
from sae.base.errors import ConfigError, DataError
from sae.coder.spec import CoderSpec
from sae.loading.hints import Hints, known_release, with_known_hints
from sae.loading.hub import MOST_OPENED, why_no_coder
from sae.loading.remote import HubFiles
from sae.untrusted import weights
from sae.untrusted.files import Files
from sae.untrusted.places import Place
from sae.untrusted.ranged import Header
from sae.untrusted.tensors import Tensors
from sae.untrusted.weights import Shapes


@dataclass(frozen=True)
class Outline:
    """A coder, as far as it is known without its weights."""

    place: Place
    format: str | None
    spec: CoderSpec | None
    why: str
    """Why the spec is not known; "" where it is."""
    tensors: Header
    """Dtype and shape by tensor; {} where the files have no headers."""
    files: tuple[str, ...]
    """The files that reading it takes, as far as that is known."""


class Unread(ConfigError):
    """Would need bytes that are not to be fetched."""


def outline(place: Place) -> Outline:
    """Returns what is known of a coder; DataError names a config or header that is damaged or does not fit."""
    seen = _Seen(place.files)
    bare = _Bare(seen, place.weights, place.hints, lazy=True)
    name, spec, why = None, None, ""
    try:
        found = formats.formats_of(bare)
        if not found:
            held = ", ".join(bare.shapes()) or "no tensors"
            raise ConfigError(f"path: {place} is in no known format; it holds {held}")
        name = found[0] if len(found) == 1 else None
        spec = formats.read(bare)[1] if seen.is_here(place.weights) else _read(bare)
        why = "" if spec else f"{place.name} would have to be fetched"
    except ConfigError as error:  # a hint may be missing, or the coder one that cannot be carried
        why = str(error)
    return Outline(place, name, spec, why, bare.headers, tuple(seen.requested))


def _read(place: "_Bare") -> CoderSpec | None:
    """Returns the spec, None if stand-ins were asked for their values."""
    for ones in (True, False):
        try:
            with torch.device("meta"):
                return formats.read(replace(place, ones=ones, opened=[]))[1]
        except DataError:
            raise
        except (NotImplementedError, RuntimeError):
            continue
    return None


def coders_at(files: Files, below: str, hints: Hints) -> list[Place]:
    """Returns the coders at or below a name, as far as they are known without fetching them; ConfigError if none is.

    What the table of releases knows of them is among their hints.
    """
    named = [with_known_hints(place, known_release(place)) for place in formats.candidates(files, below, hints)]
    own = [place for place in named if below in (place.weights, place.folder)] or named
    found = [place for place in own if _may_be_coder(place)] if len(own) <= MOST_OPENED else own
    if not own:
        raise ConfigError(f"path: {why_no_coder(files, below)}")
    return found or own


def files_needed(known: Outline) -> list[str]:
    """Returns the names of the files that reading a coder takes: where that is not known, all configs around it too."""
    place = known.place
    found = [place.weights, *(name for name in known.files if place.files.has(name))]
    return sorted({*found}) if known.spec else with_configs(place.files, found)


def with_configs(files: Files, names: list[str]) -> list[str]:
    """Returns the names of files, and of the configs in their folders and one above, sorted."""
    folders = {name.rpartition("/")[0] for name in names}
    folders |= {folder.rpartition("/")[0] for folder in folders}
    configs = [name for name in files.names() if name.endswith((".json", ".yaml", ".yml"))]
    return sorted({*names, *(name for name in configs if name.rpartition("/")[0] in folders)})


def _may_be_coder(place: Place) -> bool:
    try:
        return bool(formats.formats_of(replace(place, files=_Seen(place.files))))
    except Unread:
        return True


class _Seen:
    """Files that remember what was asked for, and do not fetch weights."""

    def __init__(self, files: Files) -> None:
        self.files, self.label, self.identity = files, files.label, files.identity
        self.requested: dict[str, None] = {}

    @property
    def revision(self) -> str | None:
        return self.files.revision

    def names(self) -> list[str]:
        return self.files.names()

    def has(self, name: str) -> bool:
        return self.files.has(name)

    def is_here(self, name: str) -> bool:
        """Returns whether a file is on this disk."""
        return not isinstance(self.files, HubFiles) or self.files.is_cached(name)

    def path(self, name: str) -> Path:
        self.requested[name] = None
        if weights.is_weights(name) and not self.is_here(name):
            raise Unread(f"{name} would have to be fetched")
        return self.files.path(name)

    def shapes(self, name: str) -> Shapes:
        return {tensor: shape for tensor, (_, shape) in self.header(name).items()}

    def header(self, name: str) -> Header:
        """Returns dtype and shape by tensor."""
        self.requested[name] = None
        if self.is_here(name):
            return {n: (_dtype_name(t), tuple(t.shape)) for n, t in weights.tensors(self.files.path(name)).items()}
        found = self.files.header(name) if isinstance(self.files, HubFiles) else None
        if found is None:
            raise Unread(f"{name} would have to be fetched: it has no header")
        return found


@dataclass(frozen=True)
class _Bare(Place):
    """A place whose tensors stand for those of files that are not here."""

    headers: Header = field(default_factory=dict)
    ones: bool = False
    """Whether vectors are made of ones, on the CPU."""

    def tensors(self, *names: str) -> Tensors:
        assert isinstance(self.files, _Seen)
        found: dict[str, Tensor] = {}
        kind = Tensors
        for name in names or (self.name,):
            own = self.files.header(self.sibling(name))
            self.headers.update(own)
            if self.files.is_here(self.sibling(name)):
                found |= weights.tensors(self.path(name))
            else:
                kind = _StandIns
                found |= {tensor: self._stand_in(*about) for tensor, about in own.items()}
        self.opened.append(kind(str(self), found))
        return self.opened[-1]

    def _stand_in(self, dtype: str, shape: tuple[int, ...]) -> Tensor:
        kind = getattr(torch, dtype, torch.float32)
        if self.ones and len(shape) == 1:
            return torch.ones(shape, dtype=kind, device="cpu")
        return torch.empty(shape, dtype=kind, device="meta")


class _StandIns(Tensors):
    def number(self, name: str) -> float:
        raise Unread(f"{name} in {self.source} would have to be fetched")


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
