"""Which latents fire together: at the peaks of one, what else fires there.

Of n uniformly sampled peaks of latent i (the largest values of cells in which it fires), h are tokens on which j fires
too. Its `share` is h / n, its `lift` that over the rate at which j fires among all tokens. Ranked is by

    f / (f_i + f_j - f)        f = min(w f_i, f_j),  w the lower end of Wilson's 95 % interval of h / n

the Jaccard index of the tokens on which i and on which j fires (f_i and f_j of them), as far as the sample is sure of
it. A dense latent fires at most peaks and has a small index, for f_j is large; a rare one has a large lift by one or
two coincidences, and an index of at most f_j / f_i. Told is what fires at two peaks or more, and more than by chance.
"""

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from interp.evidence.tally import Evidence
from interp.records import Together
from interp.scoring.metrics import wilson

TOLD = 8
LEAST = 2


def together(latent: int, ids: Integer[ndarray, "nnz"], peaks: int, evidence: Evidence) -> tuple[Together, ...]:
    """Returns the latents that fire together with one, given the ids of all that fires at so many of its peaks."""
    fired = evidence.state["fired"]
    hits = np.bincount(ids, minlength=len(fired))
    hits[latent] = 0
    others = np.flatnonzero(hits >= LEAST)
    share, mine, theirs = hits[others] / max(1, peaks), fired[latent], fired[others]
    lift = share * evidence.tokens / np.maximum(theirs, 1)
    surely = np.array([wilson(h / peaks, peaks).low or 0.0 for h in range(LEAST, peaks + 1)])
    both = np.minimum(mine * surely[hits[others] - LEAST], theirs)
    index = np.where(lift > 1, both / np.maximum(mine + theirs - both, 1), 0.0)
    order = np.argsort(-index, kind="stable")[: min(TOLD, int((lift > 1).sum()))]
    columns = (column[order].tolist() for column in (others, share, lift))
    return tuple(Together(other, s, times, peaks) for other, s, times in zip(*columns, strict=True))
