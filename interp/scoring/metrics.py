"""Every figure of a score, defined once, with its 95 % interval.

With TPR the share of active windows in which an explanation is judged to hold, FPR = 1 - TNR that of silent ones, and
r the true share of windows in which the latent fires:

    balanced accuracy = (TPR + TNR) / 2          F1 = 2 TPR / (TPR + FPR + 1)           (classes of equal size)
    precision at the true rate = r TPR / (r TPR + (1 - r) FPR)
    AUROC = P(active > silent) + P(active = silent) / 2

None depends on how many active and silent windows happened to be asked about.

Intervals. A rate has that of Wilson (1927, JASA 22:209), its n divided by the design effect of windows that come from
one section (Rao & Scott 1992, Biometrics 48:577). What is made of several rates has the MOVER interval of theirs: sums
and differences by Zou, Huang & Zhang (2009, Comput. Stat. Data Anal. 53:1080), ratios by Donner & Zou (2012, Stat.
Methods Med. Res. 21:347). All else has the percentile interval of a bootstrap that draws whole sections (Field & Welsh
2007, J. R. Stat. Soc. B 69:369).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from interp.records import TIERS, Facts, Judgement, Measure, Score, Task
from sae.base.seeding import generator

Z = 1.959963984540054  # of the normal distribution, 95 % lie within
DRAWS = 1000
BLOCK = 1_000_000  # numbers held at once while sections are drawn
KEPT_COUNTS = 64  # numbers of sections of which the draws are kept, at most 2 MB each
NONE = Measure(None)


def wilson(share: float, n: float) -> Measure:
    """Returns a share seen among n independent draws, with its score interval; n/a if n is 0."""
    if n <= 0:
        return NONE
    center = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return Measure(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def hit_rate(hits: Sequence[bool] | Bool[ndarray, "n"], sections: Sequence[int]) -> Measure:
    """Returns the share of hits, with Wilson's interval for as many draws as the windows amount to.

    Windows of one section agree more than others do, so they amount to fewer: n / max(1, d) with the design effect
    d = sum_s (sum_{i in s} (x_i - p))^2 / (n p (1 - p)). Where all agree d cannot be seen, and a section counts once.
    """
    n = len(hits)
    if n == 0:
        return NONE
    x, places = np.asarray(hits, float), _clusters(sections)
    p = float(x.mean())
    if p in (0.0, 1.0):
        return wilson(p, int(places.max()) + 1)
    spread = float(np.square(np.bincount(places, x - p)).sum())
    return wilson(p, n / max(1.0, spread / (n * p * (1 - p))))


def linear(*parts: tuple[float, Measure]) -> Measure:
    """Returns sum_i c_i m_i of pairs (c, m) of independent measures, with the MOVER interval."""
    if any(m.value is None for _, m in parts):
        return NONE
    value = sum(c * m.value for c, m in parts if m.value is not None)
    ends = [(c * m.value, sorted((c * m.low, c * m.high))) for c, m in parts if None not in (m.value, m.low, m.high)]  # type: ignore[operator]
    if len(ends) < len(parts):
        return Measure(value)
    low = math.sqrt(sum((middle - a) ** 2 for middle, (a, _) in ends))
    high = math.sqrt(sum((b - middle) ** 2 for middle, (_, b) in ends))
    return Measure(value, value - low, value + high)


def lift_over(score: Measure, null: Measure) -> Measure:
    """Returns score - null, the lift. The interval is wider than need be where both are of the same windows."""
    return linear((1.0, score), (-1.0, null))


def balanced_accuracy(tpr: Measure, tnr: Measure) -> Measure:
    """Returns (TPR + TNR) / 2."""
    return linear((0.5, tpr), (0.5, tnr))


def f1(tpr: Measure, tnr: Measure) -> Measure:
    """Returns 2 TPR / (TPR + FPR + 1), the F1 of classes of equal size."""
    return _falling(_ratio(linear((1.0, Measure(2.0, 2.0, 2.0)), (-1.0, tnr)), tpr), 2.0, 1.0)


def precision(tpr: Measure, tnr: Measure, true_rate: float | None) -> Measure:
    """Returns r TPR / (r TPR + (1 - r) FPR), n/a where nothing is judged to hold or r is unknown or 0.

    The interval takes r, which is measured on far more windows than are judged, for exact.
    """
    if not true_rate:
        return NONE
    fpr = linear((1.0, Measure(1.0, 1.0, 1.0)), (-1.0, tnr))
    return _falling(_ratio(fpr, tpr), 1.0, (1 - true_rate) / true_rate)


def auroc(values: Sequence[float], truths: Sequence[float], sections: Sequence[int]) -> Measure:
    """Returns the chance that an active window has a larger value than a silent one; n/a without both classes.

    An AUROC of 0 or 1 leaves the bootstrap no spread. There the interval is Wilson's for the size of the smaller
    class, by var(AUROC) <= A (1 - A) / min(n_active, n_silent) (Birnbaum & Klose 1957, Ann. Math. Stat. 28:933).
    """
    active = np.asarray(truths, float) > 0
    found = bootstrapped(lambda weights: weighted_auroc(values, truths, weights), sections)
    if found.value in (0.0, 1.0):
        places = _clusters(sections)
        return wilson(found.value, min(len(set(places[active])), len(set(places[~active]))))
    return found


def weighted_auroc(
    values: Sequence[float], truths: Sequence[float], weights: Float[ndarray, "b n"]
) -> Float[ndarray, "b"]:
    """Returns the AUROC of n windows under each of b rows of weights [b, n]; nan where a class has no weight."""
    x, active = np.asarray(values, float), np.asarray(truths, float) > 0
    fires, silent = np.flatnonzero(active), np.flatnonzero(~active)
    silent = silent[np.argsort(x[silent], kind="stable")]
    below, up_to = (np.searchsorted(x[silent], x[fires], side) for side in ("left", "right"))
    positive, negative = weights[:, fires], np.pad(weights[:, silent].cumsum(1), ((0, 0), (1, 0)))
    lower = (negative[:, below] + negative[:, up_to]) / 2  # ties count for a half
    with np.errstate(invalid="ignore"):
        return (positive * lower).sum(1) / (positive.sum(1) * negative[:, -1])


def correlation(
    predicted: Sequence[Sequence[float]], actual: Sequence[Sequence[float]], sections: Sequence[int]
) -> Measure:
    """Returns Pearson's correlation over all tokens of windows, given each window's; n/a where one is constant."""
    sums = np.zeros((len(predicted), 6))
    if sums.size:
        x_mean, y_mean = (float(np.concatenate([np.asarray(w, float) for w in a]).mean()) for a in (predicted, actual))
        for row, (left, right) in zip(sums, zip(predicted, actual, strict=True), strict=True):
            x, y = np.asarray(left, float) - x_mean, np.asarray(right, float) - y_mean
            row[:] = len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y

    def pearson(weights: Float[ndarray, "b n"]) -> Float[ndarray, "b"]:
        n, x, y, xx, yy, xy = (weights @ sums).T
        with np.errstate(invalid="ignore", divide="ignore"):
            # The rounding of a constant is no variance.
            square = np.where((xx * n - x * x > 1e-12 * n * xx) & (yy * n - y * y > 1e-12 * n * yy), 1.0, np.nan)
            return square * (xy * n - x * y) / np.sqrt((xx * n - x * x) * (yy * n - y * y))

    return bootstrapped(pearson, sections)


def mean_measure(values: Sequence[float]) -> Measure:
    """Returns the mean of independent values, such as one a latent, with its bootstrap interval; n/a of none."""
    if not len(values):
        return NONE
    x = np.asarray(values, float)
    return bootstrapped(lambda weights: weights @ x / weights.sum(1), range(len(x)))


def bootstrapped(statistic: Callable[[Float[ndarray, "b n"]], Float[ndarray, "b"]], sections: Sequence[int]) -> Measure:
    """Returns a statistic of n windows and its percentile interval over draws of whole sections.

    `statistic` takes weights [b, n] and returns b values, nan where a draw has none; it is n/a if it is nan for weights
    1. There is no interval if all windows are of one section. A negative section is one of its own.
    """
    places = _clusters(sections)
    value = float(statistic(np.ones((1, len(places))))[0]) if len(places) else math.nan
    if math.isnan(value):
        return NONE
    n = int(places.max()) + 1
    if n < 2:
        return Measure(value)
    blocks = (_all_counts(n, DRAWS),) if n * DRAWS <= BLOCK else _counts(n, DRAWS)
    draws = np.concatenate([statistic(counts[:, places].astype(float)) for counts in blocks])
    draws = draws[~np.isnan(draws)]
    low, high = np.percentile(draws, (2.5, 97.5)) if len(draws) else (value, value)
    return Measure(value, min(value, float(low)), max(value, float(high)))


def _counts(n: int, draws: int) -> Iterator[Int[ndarray, "b n"]]:
    """Yields how often each of n sections is drawn, some draws at a time; it depends on the numbers alone."""
    source, block = generator(0, "bootstrap", n), max(1, BLOCK // n)
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        drawn = torch.randint(n, (rows, n), generator=source).numpy() + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)


@lru_cache(KEPT_COUNTS)
def _all_counts(n: int, draws: int) -> Int[ndarray, "b n"]:
    """Returns all draws of few sections: most latents have about as many as others."""
    return next(_counts(n, draws)).astype(np.int16)


def best_threshold(values: Sequence[float], truths: Sequence[float]) -> float | None:
    """Returns t such that "value >= t" has the largest balanced accuracy; None without both classes.

    t lies half-way between two values (or is the least of all); among equals, where they are furthest apart.
    """
    x, active = np.asarray(values, float), np.asarray(truths, float) > 0
    if active.all() or not active.any():
        return None
    distinct, place = np.unique(x, return_inverse=True)
    hits, alarms = (np.bincount(place, kind, len(distinct)) for kind in (active, ~active))
    gain = hits[::-1].cumsum()[::-1] / hits.sum() - alarms[::-1].cumsum()[::-1] / alarms.sum()
    gaps = np.diff(distinct, prepend=distinct[0])
    at = max(range(len(distinct)), key=lambda i: (round(float(gain[i]), 12), gaps[i]))
    middle = float(distinct[at] - gaps[at] / 2)
    return middle if at == 0 or middle > distinct[at - 1] else float(distinct[at])


def classification(
    tasks: Sequence[Task], judgements: Sequence[Judgement], facts: Facts, threshold: float | None = 0.5
) -> Score:
    """Returns the score of telling active windows from silent ones; a value of at least `threshold` says active.

    The figures without brackets are of active windows and those of the random tier alone. Those of the other tiers are
    named "balanced_accuracy[same_token]" and so on, and are n/a where a tier has no answer. Precision is told for the
    random tier only: the true rate (that of the test split) is one of random windows. Deciles run from 0, the weakest.
    """
    answered = [
        (task, judgement.value)
        for task, judgement in zip(tasks, judgements, strict=True)
        if judgement.value is not None
    ]
    active = [(task, value) for task, value in answered if task.truth > 0]
    tpr = _share(active, threshold, True)
    measures: dict[str, Measure] = {}
    for tier in TIERS:
        silent = [(task, value) for task, value in answered if task.truth <= 0 and task.tier == tier]
        tnr, suffix = _share(silent, threshold, False), "" if tier == TIERS[0] else f"[{tier}]"
        measures[f"balanced_accuracy{suffix}"] = balanced_accuracy(tpr, tnr)
        measures[f"auroc{suffix}"] = _auroc(active + silent)
        measures[f"f1{suffix}"] = f1(tpr, tnr)
        measures[f"tnr{suffix}"] = tnr
        if tier == TIERS[0]:
            measures |= {"tpr": tpr, "precision_true_rate": precision(tpr, tnr, facts.rates.get("test"))}
    for decile in range(10):
        measures[f"recall_decile_{decile}"] = _share([a for a in active if a[0].decile == decile], threshold, True)
    return score_of(measures, judgements)


def score_of(measures: dict[str, Measure], judgements: Sequence[Judgement]) -> Score:
    """Returns measures with what every score tells beside them: answers, coverage, and why the others are missing."""
    n = sum(judgement.valid for judgement in judgements)
    invalid = Counter(judgement.reason for judgement in judgements if not judgement.valid)
    return Score(measures, n, n / max(1, len(judgements)), dict(sorted(invalid.items())))


def _share(answered: Sequence[tuple[Task, float]], threshold: float | None, above: bool) -> Measure:
    """Returns the share of answers on the right side of the threshold; n/a where there is none."""
    if threshold is None:
        return NONE
    hits = [(value >= threshold) == above for _, value in answered]
    return hit_rate(hits, [task.section for task, _ in answered])


def _auroc(answered: Sequence[tuple[Task, float]]) -> Measure:
    """Returns the AUROC of answers; n/a where they are mere yes and no, of which balanced accuracy says it all."""
    values = [value for _, value in answered]
    if set(values) <= {0.0, 1.0}:
        return NONE
    return auroc(values, [task.truth for task, _ in answered], [task.section for task, _ in answered])


def _ratio(a: Measure, b: Measure) -> Measure:
    """Returns a / b of independent measures that are not negative, infinite where b may be 0; n/a for 0 / 0.

    Donner & Zou's limits, the lower one with its numerator made rational, so that b = 0 gives no 0 / 0.
    """
    if None in (a.value, a.low, a.high, b.value, b.low, b.high):
        return NONE
    x, y, ends = a.value, b.value, (a.low, a.high, b.low, b.high)
    assert x is not None
    assert y is not None
    l1, u1, l2, u2 = (float(end) for end in ends if end is not None)
    if x == y == 0:
        return NONE
    root = math.sqrt(max(0.0, (x * y) ** 2 - l1 * u2 * (2 * x - l1) * (2 * y - u2)))
    low = l1 * (2 * x - l1) / (x * y + root) if x * y + root > 0 else 0.0
    bottom = l2 * (2 * y - l2)
    root = math.sqrt(max(0.0, (x * y) ** 2 - u1 * (2 * x - u1) * bottom))
    high = (x * y + root) / bottom if bottom > 0 else math.inf
    return Measure(x / y if y > 0 else math.inf, max(0.0, low), high)


def _falling(x: Measure, top: float, slope: float) -> Measure:
    """Returns top / (1 + slope x), which falls as x rises."""
    if x.value is None or x.low is None or x.high is None:
        return NONE
    value, low, high = (top / (1 + slope * end) if slope else top for end in (x.value, x.high, x.low))
    return Measure(value, min(value, low), max(value, high))


def _clusters(sections: Sequence[int]) -> Int[ndarray, "n"]:
    """Returns consecutive numbers for sections, each negative one taken for a section of its own."""
    own = [section if section >= 0 else -1 - place for place, section in enumerate(sections)]
    return np.unique(np.asarray(own, np.int64), return_inverse=True)[1]
