"""What a run has logged of a coder, as curves over tokens: {name: {"x": tokens, "y": values}}, for `lines` of pages."""

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

HELD_OUT = {
    "fvu": ("reconstruction", "fvu"),
    "l0": ("reconstruction", "l0"),
    "dead_share": ("density", "dead_share"),
    "ce_recovered": ("loss", "ce_recovered"),
}
"""Where an evaluation has what is drawn of it."""
NAMES = ("step", "coder", "held_out", "tokens")  # of a line, that are no curve
Curves = dict[str, dict[str, list[Any]]]


def curves(lines: Sequence[dict[str, Any]], batch_tokens: int, most: int) -> tuple[Curves, list[str]]:
    """Returns the curves of a coder's lines, of `most` points or fewer, and sentences about what is wrong in them."""
    said, rows = [], lines
    if any(a["step"] >= b["step"] for a, b in pairwise(lines)):
        latest = {line["step"]: line for line in lines}
        rows = [latest[step] for step in sorted(latest)]
        said.append(f"{len(lines) - len(rows)} steps were logged again or out of order; of each, the last is drawn.")
    found, gaps = {}, 0
    for name in dict.fromkeys(chain.from_iterable(rows)):
        if name in NAMES:
            continue
        values = [line.get(name) for line in rows]
        try:
            array = np.array(values, dtype=np.float64)  # None is nan
        except (TypeError, ValueError):
            continue  # it is no number
        gaps += int(np.isinf(array).sum() + np.isnan(array).sum()) - values.count(None)
        places = thinned(array, most)
        x = [rows[place]["step"] * batch_tokens for place in places]
        found[name] = {"x": x, "y": [values[place] if np.isfinite(array[place]) else None for place in places]}
    if gaps:
        said.append(f"{gaps} values are no finite numbers: they are gaps in the curves.")
    return found, said


def held_out_curves(evaluations: Iterable[tuple[int, dict[str, Any]]], batch_tokens: int) -> Curves:
    """Returns the curves of evaluations, given as (step, figures); what was not measured is null."""
    some = sorted(dict(evaluations).items())
    found = {}
    for name, (part, key) in HELD_OUT.items():
        values = [figures.get(part, {}).get(key) for _, figures in some]
        if any(value is not None for value in values):
            found[name] = {"x": [step * batch_tokens for step, _ in some], "y": values}
    return found


def thinned(values: Float[np.ndarray, "n"], most: int) -> list[int]:
    """Returns the places of `most` values or fewer, ascending: both ends, and the extremes of each stretch."""
    count = len(values)
    if count <= most:
        return list(range(count))
    stretches = most // 2 - 1
    width = -(-count // stretches)
    padded = np.full(stretches * width, np.nan)
    padded[:count] = np.where(np.isfinite(values), values, np.nan)
    parts, begins = padded.reshape(stretches, width), np.arange(stretches) * width
    least = np.where(np.isnan(parts), np.inf, parts).argmin(axis=1)  # the first place of a stretch that has no value
    greatest = np.where(np.isnan(parts), -np.inf, parts).argmax(axis=1)
    kept = {0, count - 1, *(begins + least).tolist(), *(begins + greatest).tolist()}
    return sorted(place for place in kept if place < count)
