"""Where a coder lies: a weight file, the files beside it, and the folder or hub repository above them.

A format asks a `Place` for names, headers, configs and tensors, and never learns whether they were on the disk or on
the hub; a file is fetched when it is first opened. What the files do not say comes as `Hints` from the user.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from sae.base.errors import DataError
from sae.untrusted import weights
from sae.untrusted.configs import read_config
from sae.untrusted.files import ABOVE, Files
from sae.untrusted.hints import Hints, Unsaid
from sae.untrusted.tensors import Tensors
from sae.untrusted.weights import Shapes


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
    hints_read: set[str] = field(default_factory=set, compare=False, repr=False)
    """Hints that the format has looked at."""
    unsaid: list[Unsaid] = field(default_factory=list, compare=False, repr=False)
    """What neither files nor hints say and the map does not need: where in the model the coder reads and writes."""

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

    def as_tensors(self, found: dict[str, Tensor]) -> Tensors:
        """Returns tensors that a format has read from the place by itself, to be taken like those of `tensors`."""
        self.opened.append(Tensors(str(self), found))
        return self.opened[-1]

    def hint(self, field: str) -> Any:
        """Returns a hint, None where nothing was said."""
        self.hints_read.add(field)
        return getattr(self.hints, field)

    def required_hint(self, field: str, why: str, allowed: str, choices: tuple[Any, ...] = ()) -> Any:
        """Returns what the user says of a field that the files are silent about; Unsaid asks for it.

        `choices` are the values that it can have, where there are few: those that the doctor tries.
        """
        said = self.hint(field)
        if said is None:
            raise self._question(field, why, allowed, choices)
        return said

    def site_hint(self, why: str, allowed: str, choices: tuple[Any, ...] = ()) -> str | None:
        """Returns what the user says of the site; None leaves the question, as in `required_hint`, in `unsaid`."""
        said = self.hint("site")
        if said is None:
            self.unsaid.append(self._question("site", why, allowed, choices))
        return said

    def _question(self, field: str, why: str, allowed: str, choices: tuple[Any, ...]) -> Unsaid:
        hint = ", or let `sae-load doctor` try each" if choices else ""
        return Unsaid(field, choices, f"{field}: {self} does not say it ({why}); pass {field}={allowed}{hint}")
