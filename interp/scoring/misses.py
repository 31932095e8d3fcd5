"""Where a judge was wrong, and by how much: what people want to see of a score.

A miss goes from 0 (right) to 1, and is above a half where the answer is wrong. By ranks it needs no scale, so that
probabilities, cosines and log-likelihoods are held against the truth alike:

    c = P(v_other > v) + P(v_other = v) / 2     of an active window with the answer v, over the answers on silent ones;
                                                of a silent one "<", over those on active ones

so that AUROC = 1 - mean c. Where a threshold decides, it says which half a miss is in, and c how far up.
"""

from collections.abc import Sequence
from itertools import count

import numpy as np

from interp.records import Judgement, Task

SEEN = 12  # tasks of a score that people are shown
RIGHT = 4  # of these, as many right ones as there are
MISSING = 2  # and as many without an answer
HALF = 0.5


def ranked_misses(
    tasks: Sequence[Task], judgements: Sequence[Judgement], threshold: float | None = None
) -> list[float | None]:
    """Returns by task how far its answer is on the wrong side of those of the other truth; None without an answer."""
    active = np.array([task.truth > 0 for task in tasks], bool)
    valid = np.array([judgement.valid for judgement in judgements], bool)
    values = np.array([0.0 if given.value is None else given.value for given in judgements])
    misses: list[float | None] = [None] * len(tasks)
    for kind in (True, False):
        sign = 1.0 if kind else -1.0
        others = np.sort(sign * values[valid & (active != kind)])
        mine = np.flatnonzero(valid & (active == kind))
        low, high = (np.searchsorted(others, sign * values[mine], side) for side in ("left", "right"))
        above = len(others) - (low + high) / 2  # of what is on the wrong side, ties for a half
        found = (above + HALF) / (len(others) + 1)
        if threshold is not None:
            found = ((values[mine] >= threshold) != kind) / 2 + found / 2
        for i, miss in zip(mine.tolist(), found.tolist(), strict=True):
            misses[i] = miss
    return misses


def worth_seeing(
    tasks: Sequence[Task], judgements: Sequence[Judgement], misses: Sequence[float | None], most: int = SEEN
) -> list[int]:
    """Returns the numbers of some tasks: the worst misses first, then some without an answer, each reason before the
    same again, then those that are most right. Of these, and of equal misses, active and silent windows take turns.
    """
    turns = {True: count(), False: count()}
    wrong = [
        (-miss, next(turns[tasks[i].truth > 0]), i) for i, miss in enumerate(misses) if miss is not None and miss > HALF
    ]
    fits = sorted((miss, i) for i, miss in enumerate(misses) if miss is not None and miss <= HALF)
    wrong, turns = sorted(wrong), {True: count(), False: count()}
    right = sorted((next(turns[tasks[i].truth > 0]), miss, i) for miss, i in fits)
    again: dict[str, count[int]] = {}
    lost = [(i, found.reason) for i, found in enumerate(judgements) if misses[i] is None]
    missing = sorted((next(again.setdefault(reason, count())), i) for i, reason in lost)
    few = missing[: max(MISSING, most - len(wrong) - len(right))]
    n_right = min(len(right), max(RIGHT, most - len(wrong) - len(few)))
    chosen = (*wrong[: most - len(few) - n_right], *few, *right[:n_right])
    return [one[-1] for one in chosen]
