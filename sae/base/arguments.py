"""Arguments of another kind than a function takes: one line that says what was given and what is taken."""

import operator
import sys
from typing import Any

from sae.base.errors import ConfigError
from sae.base.settings import shown

LONGEST = 60


def wrong(argument: str, value: Any, wanted: str) -> TypeError:
    """Returns the error of an argument: its name, what it is, and what it may be."""
    return TypeError(f"{argument}: {described(value)} was given; it takes {wanted}")


def described(value: Any) -> str:
    """Returns what a value is, in a few words: long ones by their type, arrays and tensors by their shape too."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}, not an object of it,"
    kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}".removeprefix("builtins.")
    if isinstance(value, str):
        return f"the text {shown(value if len(value) <= LONGEST else value[: LONGEST - 3] + '...')}"
    shape = getattr(value, "shape", None)
    return f"{kind} of shape {list(shape)}" if isinstance(shape, tuple) else kind


def plain(value: Any) -> Any:
    """Returns the numbers and texts of numpy, torch and pandas, within lists and ranges too, as Python's own."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [plain(item) for item in value] if isinstance(value, list | tuple | range) else value


def number(argument: str, value: Any) -> float:
    """Returns a number, of numpy or torch too, as Python's own; TypeError for anything else."""
    given: Any = plain(value)
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise wrong(argument, value, "a number")
    if isinstance(given, int) and abs(given) > sys.float_info.max:
        raise ConfigError(f"{argument}: it is larger than a number may be")
    return given


def whole(argument: str, value: Any, least: int = 1) -> int:
    """Returns a whole number of at least `least`; 1e5 is one, and numpy's are. TypeError or ConfigError for others."""
    given: Any = int(value) if isinstance(value, float) and value.is_integer() else value
    try:
        number = operator.index(given)
    except TypeError:
        raise wrong(argument, value, "a whole number") from None
    if isinstance(value, bool):
        raise wrong(argument, value, "a whole number")
    if number < least:
        raise ConfigError(f"{argument}: {number} is too small; it must be at least {least}")
    return number
