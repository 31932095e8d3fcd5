"""The registries: a plug-in is one file in its folder, found by name and never listed anywhere else.

A family of plug-ins is a direct subclass of `Plugin`; every plug-in is a frozen dataclass that registers itself under
the name users type as `type:`, with `@Family.register_subclass("name")`.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from draccus import ChoiceRegistry as Plugin

__all__ = ["Plugin", "discover", "names"]


def discover(package: ModuleType) -> None:
    """Imports every module of `package`, so that its plug-ins register themselves."""
    for module in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")


def names(family: type[Plugin]) -> dict[str, type[Any]]:
    """Returns {name: class} of all plug-ins of a family, sorted by name."""
    return dict(sorted(family.get_known_choices().items()))
