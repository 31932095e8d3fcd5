"""Folders of coders as names: what is there, which of it may be opened, and what tensors it declares."""

import os
import re
from pathlib import Path
from typing import Protocol

from sae.base.errors import DataError
from sae.base.files import safe_join
from sae.untrusted import weights
from sae.untrusted.weights import Shapes

ABOVE = re.compile(r"\.\./[\w.-]+\.(json|ya?ml)")  # the only way up: a config of the whole run or repository


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


def _is_snapshot(path: Path) -> bool:
    """Returns whether a folder is a commit in the hub's own cache: models--owner--name/snapshots/<commit>."""
    return path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
