"""The registries: a plug-in is one file in its folder, found by name and never listed anywhere else.

A family of plug-ins is a package that defines a direct subclass of `Plugin` and ends with
`discover(__name__, __path__)`; every other module in it holds a frozen dataclass that registers itself, with
`@Family.register_subclass("name")`, under the name users type as `type:`.
"""

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from draccus import ChoiceRegistry as Plugin

__all__ = ["Plugin", "discover", "names"]


def discover(package: str, path: Iterable[str]) -> dict[str, ModuleType]:
    """Imports every plug-in of a package, so that it registers itself; returns {name: module}. "_" begins helpers."""
    found = [module.name for module in iter_modules(path) if not module.name.startswith("_")]
    return {name: import_module(f"{package}.{name}") for name in found}


def names(family: type[Plugin]) -> dict[str, type[Any]]:
    """Returns {name: class} of all plug-ins of a family, sorted by name."""
    return dict(sorted(family.get_known_choices().items()))
