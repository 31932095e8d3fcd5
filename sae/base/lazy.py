"""Packages whose names live in other modules and are imported when they are first used."""

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

_ABOVE: dict[str, str] = {}


def supply(what: str, module: str) -> None:
    """Says which module does what a lower room offers to users and may not import; the package knows both."""
    _ABOVE[what] = module


def supplied(what: str) -> Any:
    """Returns the module that does it, imported when it is first asked."""
    return import_module(_ABOVE[what])


def on_demand(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns the `__getattr__` and the `__dir__` of a package, given the module of each of its public names.

    `dir` tells these names and `__version__` alone, which is what notebooks and shells complete.
    """

    def get(name: str) -> Any:
        if name == "__version__":
            return import_module("sae.base.version").version()
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if os.environ.get("SAE_LOG"):
            import_module("sae.base.logs").listen_if_asked()
        return getattr(import_module(homes[name]), name)

    return get, lambda: sorted([*homes, "__version__"])
