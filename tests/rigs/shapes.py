"""Shapes in signatures, checked at run time, and nothing else, so that tests may have stand-ins for what they call.

A loop calls the same function thousands of times with the same shapes, and looking costs a third of such a test; so a
test checks the first calls of every function.
"""

import dataclasses
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import FunctionType
from typing import Any, get_args

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray

ROOT = Path(__file__).parents[2]
CALLS = 2
"""Calls of a function that are checked in each test."""
WHOLE = ("sae.coder.coder", "sae.coder.spec", "sae.coder.tensors", "sae.coder.normalization", "sae.encoders")
WHOLE += ("sae.kernels", "sae.selection", "sae.objectives", "sae.evaluation.metrics")
"""Where every type is checked."""

_test = 0
_jaxtyped = jaxtyping.jaxtyped


def install() -> None:
    """Has the modules that are imported from now on checked."""
    jaxtyping.jaxtyped = _sparing  # what the hook has every function and class call
    jaxtyping.install_import_hook(WHOLE, "beartype.beartype")
    jaxtyping.install_import_hook(_shaped(), "rigs.shapes.checked")


def begin_test() -> None:
    """Counts calls anew."""
    global _test
    _test += 1


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that checks those of its arguments and results whose type is a shape."""
    kept = {name: kind for name, kind in function.__annotations__.items() if _has_shape(kind)}
    function.__annotations__ = kept
    return beartype(function) if kept else function


def _shaped() -> list[str]:
    """Returns the modules, but for the whole ones, that have shapes in their signatures."""
    paths = [path for package in ("sae", "interp") for path in sorted((ROOT / package).rglob("*.py"))]
    found = [
        path.relative_to(ROOT).with_suffix("") for path in paths if "jaxtyping" in path.read_text(encoding="utf-8")
    ]
    names = [".".join(path.parts).removesuffix(".__init__") for path in found]
    return [name for name in names if not any(f"{name}.".startswith(f"{whole}.") for whole in WHOLE)]


def _sparing(thing: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """Returns a function, or a data class by its `__init__`, whose first calls in every test are checked."""
    if thing is None:
        return partial(_sparing, typechecker=typechecker)
    if isinstance(thing, type):
        if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = _sparing(thing.__init__, typechecker=typechecker)
        return thing
    if not isinstance(thing, FunctionType):
        return _jaxtyped(thing, typechecker=typechecker)
    kinds = thing.__annotations__.values()
    if not kinds or any(getattr(kind, "__name__", "") == "constexpr" for kind in kinds):
        return thing  # nothing to check; Triton compiles the source of a kernel, which must be the function itself
    if typechecker is checked and not any(isinstance(k, str) or _has_shape(k) for k in kinds):
        return thing
    looking, test, calls = None, 0, 0

    @wraps(thing)
    def sparing(*args: Any, **kwargs: Any) -> Any:
        nonlocal looking, test, calls
        test, calls = _test, calls + 1 if test == _test else 1
        if calls > CALLS:
            return thing(*args, **kwargs)
        looking = looking or _jaxtyped(thing, typechecker=typechecker)  # made when needed: most functions never are
        return looking(*args, **kwargs)

    return sparing


def _has_shape(kind: Any) -> bool:
    if isinstance(kind, type) and not get_args(kind):
        return issubclass(kind, AbstractArray)
    return any(map(_has_shape, get_args(kind)))
