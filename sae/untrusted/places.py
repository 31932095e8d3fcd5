"""Where a released coder lies: a weight file, the files beside it, and the folder or hub repository above them.

A format asks a `Place` for names, headers, configs and tensors, and never learns whether they were on the disk or on
the hub; a file is fetched when it is first opened. What the files do not say comes as `Hints` from the user.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from sae.base.errors import ConfigError, DataError, nearest
from sae.base.files import safe_join
from sae.coder.normalization import Normalization
from sae.lm.sites import is_centered, on_stream
from sae.untrusted import weights
from sae.untrusted.foreign import read_config, shown
from sae.untrusted.weights import Shapes

ABOVE = re.compile(r"\.\./[\w.-]+\.(json|ya?ml)")  # the only way up: a config of the whole run or repository
LARGEST = 2**40  # no width or count of a coder is larger
FINITE_CHUNK = 2**24


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
    processed: bool | None = None
    """Whether its activations were those of a TransformerLens model with centered writing weights."""
    normalization: str | None = None
    """What SAELens' config should say for normalize_activations, where a release is known to have it wrong."""
    format: str | None = None
    """Name of the format, of files that look like several."""


class Unsaid(ConfigError):
    """What the files of a coder do not say and the user has not said."""

    def __init__(self, field: str, choices: tuple[Any, ...], message: str) -> None:
        super().__init__(message)
        self.field, self.choices = field, choices


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
        self.root = Path(os.path.abspath(root))
        self.label = self.identity = self.root.as_posix()
        cached = next((p for p in (self.root, *self.root.parents) if _is_snapshot(p)), None)
        self.within = cached.parent.parent if cached else self.root  # snapshots link to blobs beside them
        if cached:
            self.revision = cached.name
            below = self.root.relative_to(cached).as_posix()
            self.identity = "/".join([*self.within.name.split("--")[1:], *([] if below == "." else [below])])

    def names(self) -> list[str]:
        """Returns the names of all files that are not hidden and can be printed."""
        found = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if os.path.isfile(path))
        open_ones = (name for name in found if not any(part.startswith(".") for part in name.split("/")))
        return sorted(name for name in open_ones if name.isprintable())

    def has(self, name: str) -> bool:
        """Returns whether there is a file of that name."""
        return os.path.isfile(self.root / name)

    def path(self, name: str) -> Path:
        """Returns the file; DataError if the name leaves the folder or is missing."""
        folder = self.root
        if ABOVE.fullmatch(name):
            folder, name = self.root.parent, name.removeprefix("../")
        within = folder if self.within == self.root else self.within
        path = safe_join(within, (folder.relative_to(within) / name).as_posix())
        if not os.path.isfile(path):
            raise DataError(f"{path} is missing, or no file")
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
        """Returns a matrix as [rows, columns], whichever way it is stored.

        A square one is taken as the format documents it, which is `transposed` or not; else the orientation follows
        from the lengths of the biases. DataError if neither way fits.
        """
        tensor = self[name]
        shape = tuple(tensor.shape)
        if shape not in ((rows, columns), (columns, rows)):
            raise DataError(
                f"{self.source}: tensor {name} has shape {shape}, expected {(rows, columns)} or its transpose"
            )
        flip = transposed if rows == columns else shape == (columns, rows)
        return tensor.T if flip else tensor

    def all(self) -> dict[str, Tensor]:
        """Returns all tensors, each counted as used."""
        return {name: self[name] for name in self._found}

    def number(self, name: str) -> float:
        """Returns a tensor of one value as a number; DataError names it if it is none."""
        tensor = self[name]
        if tensor.numel() != 1:
            raise DataError(f"{self.source}: tensor {name} has shape {tuple(tensor.shape)}, expected one number")
        finite({name: tensor}, self.source)
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
    asked: set[str] = field(default_factory=set, compare=False, repr=False)
    """Hints that the format has looked at."""

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
                return read_config(self.path(name))
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
            more = weights.tensors(path)
            if twice := found.keys() & more.keys():
                raise DataError(f"{path}: tensor {min(twice)} is in another file as well")
            found |= more
        self.opened.append(Tensors(str(self) if len(names) < 2 else f"{self.files.label}/{self.folder}", found))
        return self.opened[-1]

    def taken(self, found: dict[str, Tensor]) -> Tensors:
        """Returns tensors that a format has read from the place by itself, to be taken like those of `tensors`."""
        self.opened.append(Tensors(str(self), found))
        return self.opened[-1]

    def said(self, field: str) -> Any:
        """Returns a hint, None where nothing was said."""
        self.asked.add(field)
        return getattr(self.hints, field)

    def centering(self, hook: str, model: str) -> Normalization:
        """Returns "center" if a coder of a model as TransformerLens loads it read activations without their mean.

        That depends on the hook and on the model's norms; of a model that is not known the user must say it.
        """
        raw, centered = Normalization(), Normalization("center")
        if not on_stream(hook):
            return raw
        known = [is_centered(name) for name in (self.hints.model, model) if name]
        found = next((answer for answer in known if answer is not None), None)
        if found is not None:
            return centered if found else raw
        why = f"TransformerLens centers what is written to the stream if {model or 'the model'} has layer norms"
        return centered if self.need("processed", why, "True or False", (True, False)) else raw

    def need(self, field: str, why: str, allowed: str, choices: tuple[Any, ...] = ()) -> Any:
        """Returns what the user says of a field that the files are silent about; Unsaid asks for it.

        `choices` are the values that it can have, where there are few: those that the doctor tries.
        """
        said = self.said(field)
        if said is None:
            hint = ", or let `sae-load doctor` try each" if choices else ""
            raise Unsaid(field, choices, f"{field}: {self} does not say it ({why}); pass {field}={allowed}{hint}")
        return said


def as_int(value: Any, name: str, source: object) -> int:
    """Returns a whole number of a config, 0 or more; DataError names the field if it is none."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST
    if not fits or value != int(value):
        raise DataError(f"{source}: {name} is {_said(value)}, expected a whole number")
    return int(value)


def as_flag(config: Mapping[str, Any], name: str, source: object, default: bool = False) -> bool:
    """Returns a truth value of a config, `default` where it is left out or null; DataError names one that is none."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"{source}: {name} is {value!r}, expected true or false")
    return default if value is None else value


def one_of(value: Any, allowed: Iterable[str], name: str, source: object) -> str:
    """Returns a word of a config that must be one of these; DataError names the field, the value and the nearest."""
    words = list(allowed)
    if value not in words:
        close = nearest(value, words) if isinstance(value, str) and len(value) < 100 else ""
        raise DataError(f"{source}: {name} is {_said(value)}; known are {', '.join(words)}.{close}")
    return value


def _said(value: Any) -> str:
    return shown(repr(value)) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raises DataError naming a tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        rows = tensor if tensor.dim() else tensor[None]
        at_once = max(1, FINITE_CHUNK * len(rows) // max(1, rows.numel()))
        for part in rows.split(at_once):  # what isfinite makes of it takes more room than the tensor
            if not torch.isfinite(part.float() if part.element_size() == 1 else part).all():
                raise DataError(f"{source}: tensor {name} holds NaN or Inf, read as {tensor.dtype}")


def _is_snapshot(path: Path) -> bool:
    """Returns whether a folder is a commit in the hub's own cache: models--owner--name/snapshots/<commit>."""
    return path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
