"""The registries: a plug-in is one file in its folder, found by name and never listed anywhere else.

A family of plug-ins is a package that defines a direct subclass of `Plugin` and ends with
`discover(__name__, __path__)`; every other module in it holds a frozen dataclass that registers itself, with
`@Family.register_subclass("name")`, under the name users type as `type:`.
"""

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from draccus import ChoiceRegistry as Plugin

__all__ = ["Plugin", "discover", "names"]


def discover(package: str, path: Iterable[str]) -> None:
    """Imports every module of a package, so that its plug-ins register themselves."""
    for module in iter_modules(path):
        import_module(f"{package}.{module.name}")


def names(family: type[Plugin]) -> dict[str, type[Any]]:
    """Returns {name: class} of all plug-ins of a family, sorted by name."""
    return dict(sorted(family.get_known_choices().items()))
