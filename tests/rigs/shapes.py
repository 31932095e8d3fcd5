"""Shapes in signatures, checked at run time, and nothing else, so that tests may have stand-ins for what they call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray

ROOT = Path(__file__).parents[2]
WHOLE = ("sae.coder.coder", "sae.coder.spec", "sae.coder.tensors", "sae.coder.normalization", "sae.encoders")
WHOLE += ("sae.kernels", "sae.selection", "sae.objectives", "sae.evaluation.metrics")
"""Where every type is checked."""


def shaped() -> list[str]:
    """Returns the other modules that have shapes in their signatures."""
    paths = [path for package in ("sae", "interp") for path in sorted((ROOT / package).rglob("*.py"))]
    found = [
        path.relative_to(ROOT).with_suffix("") for path in paths if "jaxtyping" in path.read_text(encoding="utf-8")
    ]
    names = [".".join(path.parts).removesuffix(".__init__") for path in found]
    return [name for name in names if not any(f"{name}.".startswith(f"{whole}.") for whole in WHOLE)]


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that checks those of its arguments and results whose type is a shape."""
    kept = {name: kind for name, kind in function.__annotations__.items() if _has_shape(kind)}
    function.__annotations__ = kept
    return beartype(function) if kept else function


def _has_shape(kind: Any) -> bool:
    if isinstance(kind, type) and not get_args(kind):
        return issubclass(kind, AbstractArray)
    return any(map(_has_shape, get_args(kind)))
