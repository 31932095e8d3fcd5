"""JSON of strangers, which may be anything at any place: what is not of the kind that is wanted counts as missing."""

import json
import math
from typing import Any

MOST = 10**12
"""No count that a server tells is larger."""


def record(value: Any) -> dict[str, Any]:
    """Returns an object; {} for anything else."""
    return value if isinstance(value, dict) else {}


def listed(value: Any) -> list[Any]:
    """Returns a list; [] for anything else."""
    return value if isinstance(value, list) else []


def first(value: Any) -> dict[str, Any]:
    """Returns the object that a list begins with; {} where there is none."""
    return record(next(iter(listed(value)), None))


def number(value: Any) -> float | None:
    """Returns a finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def count(value: Any) -> int | None:
    """Returns a whole number from 0 to MOST; None for anything else."""
    found = number(value)
    return int(found) if found is not None and 0 <= found <= MOST and found == int(found) else None


def told(value: Any) -> str:
    """Returns a value as text that can be shown and sent: without halves of characters."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "(nested too deeply)"
    return text.encode(errors="replace").decode()
