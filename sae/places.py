"""Where a released coder lies: a weight file, the files beside it, and the folder or hub repository above them.

A format asks a `Place` for names, headers, configs and tensors, and never learns whether they were on the disk or on
the hub; a file is fetched when it is first opened. What the files do not say comes as `Hints` from the user.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from sae import weights
from sae.errors import ConfigError, DataError, nearest
from sae.files import read_json, safe_join
from sae.settings import read_yaml
from sae.weights import Shapes

ABOVE = re.compile(r"\.\./[\w.-]+\.(json|ya?ml)")  # the only way up: a config of the whole run or repository


@dataclass(frozen=True)
class Hints:
    """What the user says of a coder where its files are silent; None where nothing was said."""

    model: str | None = None
    """Hub id or folder of the language model."""
    site: str | None = None
    """Where it reads (module path or TransformerLens name); "READ->WRITTEN" of a transcoder."""
    pre_bias: str | None = None
    """none | decoder | own."""
    scale: float | None = None
    """Factor on its inputs, of a coder trained on scaled activations whose files leave it out."""
    format: str | None = None
    """Name of the format, of files that look like several."""


class Files(Protocol):
    """A folder or a hub repository."""

    label: str
    """How messages call it."""
    identity: str
    """Repository id, or the folder's path: formats without a config read model and layer from it."""

    @property
    def revision(self) -> str | None:
        """Returns the commit of a repository."""
        ...

    def names(self) -> list[str]:
        """Returns the names of all files, relative, with slashes."""
        ...

    def has(self, name: str) -> bool:
        """Returns whether there is a file of that name; "../x" is one folder above."""
        ...

    def path(self, name: str) -> Path:
        """Returns a file on this disk; DataError says how to get it if it cannot be had."""
        ...

    def shapes(self, name: str) -> Shapes:
        """Returns the shapes of a weight file's tensors, from its header where it has one."""
        ...


class LocalFiles:
    """The files at and below a folder. Links out of it are refused, but for those of the hub's own cache."""

    revision: str | None = None

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.label = self.identity = self.root.as_posix()
        cached = next((p for p in (self.root, *self.root.parents) if p.parent.name == "snapshots"), None)
        self.within = cached.parent.parent if cached else self.root  # snapshots link to blobs beside them
        if cached and self.within.name.startswith("models--"):
            self.revision = cached.name
            below = self.root.relative_to(cached).as_posix()
            self.identity = "/".join([*self.within.name.split("--")[1:], *([] if below == "." else [below])])

    def names(self) -> list[str]:
        """Returns the names of all files that are not hidden."""
        found = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))

    def has(self, name: str) -> bool:
        """Returns whether there is a file of that name."""
        return (self.root / name).is_file()

    def path(self, name: str) -> Path:
        """Returns the file; DataError if the name leaves the folder or is missing."""
        path = self.root / name
        if ABOVE.fullmatch(name):
            path = self.root.parent / name.removeprefix("../")
        elif self.within == self.root:
            path = safe_join(self.root, name)
        elif ".." in PurePosixPath(name).parts or not path.resolve().is_relative_to(self.within.resolve()):
            raise DataError(f"{name!r} is refused: it points outside of {self.within}")
        if not path.is_file():
            raise DataError(f"{path} is missing")
        return path

    def shapes(self, name: str) -> Shapes:
        """Returns the shapes of a weight file's tensors."""
        return weights.shapes(self.path(name))


class Tensors(Mapping[str, Tensor]):
    """The tensors of a coder's files. What is taken is checked; what nobody takes is an error in the end."""

    def __init__(self, source: str, found: dict[str, Tensor]) -> None:
        self.source, self._found, self._left = source, found, dict.fromkeys(found)

    def __getitem__(self, name: str) -> Tensor:
        """Returns a tensor and counts it as used; DataError if it is missing."""
        if name not in self._found:
            raise DataError(f"{self.source}: tensor {name} is missing.{nearest(name, self._found)}")
        self._left.pop(name, None)
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __iter__(self) -> Any:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def take(self, name: str, *shape: int) -> Tensor:
        """Returns a tensor of exactly this shape (or any, if none is given); DataError names it otherwise."""
        tensor = self[name]
        if shape and tuple(tensor.shape) != shape:
            raise DataError(f"{self.source}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
        return tensor

    def matrix(self, name: str, rows: int, columns: int, transposed: bool = False) -> Tensor:
        """Returns a matrix as [rows, columns], whichever way it is stored; a square one as the format documents it, which
        is `transposed` or not.

        Its orientation follows from the lengths of the biases: DataError if neither way fits.
        """
        tensor = self[name]
        if tuple(tensor.shape) not in ((rows, columns), (columns, rows)):
            raise DataError(
                f"{self.source}: tensor {name} has shape {tuple(tensor.shape)}, expected {(rows, columns)} or its transpose"
            )
        flip = transposed if rows == columns else tuple(tensor.shape) == (columns, rows)
        return tensor.T if flip else tensor

    def all(self) -> dict[str, Tensor]:
        """Returns all tensors, each counted as used."""
        return {name: self[name] for name in self._found}

    def number(self, name: str) -> float:
        """Returns a tensor of one value as a number."""
        tensor = self[name]
        if tensor.numel() != 1:
            raise DataError(f"{self.source}: tensor {name} has shape {tuple(tensor.shape)}, expected one number")
        return float(tensor)

    def ignore(self, *names: str) -> None:
        """Says that these tensors, as far as they are there, do not bear on what the coder computes."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Raises DataError naming a tensor that was not used: then this is not the coder that it was taken for."""
        if self._left:
            names = ", ".join(list(self._left)[:4])
            raise DataError(f"{self.source}: tensor {names} is not part of this format; refused rather than left out")


@dataclass(frozen=True)
class Place:
    """One weight file with what lies around it: where one coder is."""

    files: Files
    weights: str
    """Name of the weight file, relative to `files`."""
    hints: Hints = field(default_factory=Hints)
    lazy: bool = False
    """Whether tensors are only mapped, and nothing is read that is not asked for: no digest, no search for NaN."""
    opened: list[Tensors] = field(default_factory=list, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Returns the weight file's own name."""
        return PurePosixPath(self.weights).name

    @property
    def folder(self) -> str:
        """Returns the folder of the weight file, relative; "" at the root."""
        parent = PurePosixPath(self.weights).parent.as_posix()
        return "" if parent == "." else parent

    @property
    def identity(self) -> str:
        """Returns repository (or folder) and weight file: "google/gemma-scope-2b-pt-res/layer_3/.../params.npz"."""
        return f"{self.files.identity}/{self.weights}"

    def __str__(self) -> str:
        return f"{self.files.label}/{self.weights}"

    def sibling(self, name: str) -> str:
        """Returns the relative name of a file beside the weight file; "../x.json" is a config one folder up."""
        if ABOVE.fullmatch(name) and self.folder:
            return (PurePosixPath(self.folder).parent / name.removeprefix("../")).as_posix()
        return f"{self.folder}/{name}" if self.folder else name

    def has(self, name: str) -> bool:
        """Returns whether a file of that name lies beside the weight file (or one folder up: "../config.json")."""
        return self.files.has(self.sibling(name))

    def beside(self, pattern: str) -> list[str]:
        """Returns the names of files beside the weight file that match a regular expression wholly, sorted."""
        start = f"{self.folder}/" if self.folder else ""
        own = (name.removeprefix(start) for name in self.files.names() if name.startswith(start))
        return sorted(name for name in own if "/" not in name and re.fullmatch(pattern, name))

    def path(self, name: str) -> Path:
        """Returns a file beside the weight file, on this disk."""
        return self.files.path(self.sibling(name))

    def config(self, *names: str) -> dict[str, Any]:
        """Returns the first JSON or YAML file of these that is there, {} if none is; DataError if it is no mapping."""
        for name in names:
            if self.has(name):
                path = self.path(name)
                found = read_yaml(path) if name.endswith((".yaml", ".yml")) else read_json(path)
                if not isinstance(found, dict):
                    raise DataError(f"{path} holds a {type(found).__name__}, expected an object")
                return found
        return {}

    def shapes(self, name: str | None = None) -> Shapes:
        """Returns the shapes of a weight file's tensors, from its header where it has one."""
        return self.files.shapes(self.sibling(name or self.name))

    def tensors(self, *names: str) -> Tensors:
        """Returns the tensors of the weight file, or of several files beside it together."""
        found: dict[str, Tensor] = {}
        for name in names or (self.name,):
            path = self.path(name)
            if not self.lazy:
                weights.verify(path)
            found |= weights.tensors(path)
        self.opened.append(Tensors(str(self) if len(names) < 2 else f"{self.files.label}/{self.folder}", found))
        return self.opened[-1]

    def taken(self, found: dict[str, Tensor]) -> Tensors:
        """Returns tensors that a format has read from the place by itself, to be taken like those of `tensors`."""
        self.opened.append(Tensors(str(self), found))
        return self.opened[-1]

    def need(self, field: str, why: str, allowed: str) -> Any:
        """Returns what the user says of a field that the files are silent about; ConfigError asks for it."""
        said = getattr(self.hints, field)
        if said is None:
            raise ConfigError(
                f"{field}: {self} does not say it ({why}); pass {field}={allowed}, or ask the doctor to try each"
            )
        return said


def as_int(value: Any, name: str, source: object) -> int:
    """Returns a whole number of a config; DataError names the field if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise DataError(f"{source}: {name} is {value!r}, expected a whole number")
    return int(value)


def one_of(value: Any, allowed: Iterable[str], name: str, source: object) -> str:
    """Returns a word of a config that must be one of these; DataError names the field, the value and the nearest."""
    words = list(allowed)
    if value not in words:
        raise DataError(f"{source}: {name} is {value!r}; known are {', '.join(words)}.{nearest(str(value), words)}")
    return value


def finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raises DataError naming a tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"{source}: tensor {name} holds NaN or Inf")


def parse_json(text: str, source: object) -> Any:
    """Returns the value of a JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not valid JSON: {error}") from error
