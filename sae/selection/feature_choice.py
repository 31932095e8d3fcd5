"""Feature Choice: each latent takes its own m_i tokens of largest affinity (Ayonrinde, arXiv 2411.02124).

    choose S in {0, 1}^(B x d_sae) with column sums m_i that maximizes sum S * A,   sum of m_i = k B

No latent can die of neglect, since each has tokens in every batch. m_i follows a shifted Zipf curve over the latents'
rank by density, as measured densities do. Entries that are not positive are stored with the value 0 and have not fired.

What the paper's text left open, and how it is read here:
- Density is what a latent would win under Mutual Choice of the same budget, as a running mean. With `density: own` it
  is what it fires under its own m_i, which mostly repeats m_i: a latent then keeps the rank it started with, unless
  Mutual Choice trained first. On the synthetic data the first reading alone does as well as the second one phased.
- Exponent and shift are fitted to those densities at every step (`base/zipf.py`) and reported, unless they are given.
- m_i is a whole number, at least 1 and at most B. Where there are more latents than entries (d_sae > k B) the least is
  0 and fractions carry over from step to step, so that a rare latent has its turn.
- Outside training, a latent fires above a threshold of its own: the running mean of the middle between
  its m_i-th and its next largest affinity.
- `mutual_share` begins with Mutual Choice and then goes over to Feature Choice (phased training). The very first step
  is always Mutual Choice's: before it there is no order of the latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.base import zipf
from sae.base.errors import ConfigError
from sae.base.settings import choose
from sae.base.sums import in_float64
from sae.kernels.codes import Entries, Support, where
from sae.kernels.largest import among_largest, by_rank, ranks, reached, top_entries, top_of_columns
from sae.parallel import collectives
from sae.parallel.collectives import bytes_of_rows
from sae.parallel.cut import Cut
from sae.parallel.ledger import Ledger
from sae.selection import NEVER, Moment, Selection
from sae.selection.mutual_choice import (
    DOUBLE,
    ROOM,
    MutualChoice,
    add_to_mean,
    entries_above,
    mean_of,
    running_mean,
    smallest_positive,
)

OWN_ROOM = 2  # times as many candidates as latents need may be in a tile


@Selection.register_subclass("feature_choice")
@dataclass(frozen=True)
class FeatureChoice(MutualChoice):
    """Keeps, for each latent, its largest tokens of the batch."""

    over: ClassVar[str] = "nothing"  # every latent has a threshold of its own
    beside_scores: ClassVar[float] = 1.4
    units: ClassVar[Mapping[str, str] | None] = {"threshold": "scores"}
    mutual_share: float = 0.0
    """Share of the steps in which Mutual Choice trains first."""
    exponent: float | None = None
    """Exponent of the Zipf curve; none: fitted."""
    shift: float | None = None
    """Shift of the Zipf curve; none: fitted."""
    density: str = "mutual"
    """What ranks the latents: mutual, what each would win under Mutual Choice; own, what it fires under its budget."""
    density_decay: float = 0.99
    """Decay, per step, of those running densities."""

    def validate(self, d_sae: int) -> None:
        """Raises ConfigError if a constant is out of range."""
        super().validate(d_sae)
        if not 0 <= self.mutual_share <= 1:
            raise ConfigError(f"selection.mutual_share: {self.mutual_share} is not between 0 and 1")
        choose("selection.density", self.density, ("mutual", "own"))
        if not 0 <= self.density_decay < 1:
            raise ConfigError(f"selection.density_decay: {self.density_decay} is not at least 0 and below 1")
        for name in ("exponent", "shift"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"selection.{name}: {value} must be at least 0")

    def buffers(self, d_sae: int) -> dict[str, Float[Tensor, "d_sae"]]:
        """Returns thresholds under which nothing fires until they are calibrated."""
        return {"threshold": torch.full((d_sae,), NEVER)}

    def infer(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor]) -> Support:
        """Returns the entries above their latent's threshold."""
        return where(scores > tensors["threshold"])

    def start(self, m: int) -> dict[str, Tensor]:
        """Returns empty densities, thresholds and carried fractions."""
        density, carry = torch.zeros(m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
        return {**running_mean(m), "density": density, "carry": carry, "steps": torch.zeros((), dtype=torch.int64)}

    def begin(self, moment: Moment) -> None:
        """Deals out the budgets of the step, those of all latents, since they share the curve."""
        state, cut, total = moment.state, moment.cut, self.budget(moment)
        density, most = cut.whole(state["density"]), max(1, moment.n_tokens)
        m = len(density)
        if not cut.axis.moves:  # what another cut has left behind
            state = moment.state = {name: value for name, value in state.items() if not name.startswith("zipf.")}
        wanted = total * zipf.ranked(self.curve(density).shares(m), density)
        if m <= total:
            state["budgets"] = cut.own(zipf.budgets(wanted, total, most, least=1))
            return
        wanted = zipf.fill(wanted, total, most, least=0) + cut.whole(state["carry"])
        budgets = zipf.budgets(wanted, total, most, least=0)
        state["budgets"] = cut.own(budgets)
        if not self._is_mutual(moment):
            left = cut.own((wanted - budgets).clamp(-1, 1))
            state["carry"] = torch.where(self._ordered(state), left, state["carry"])

    def curve(self, density: Float[Tensor, "m"]) -> zipf.Zipf:
        """Returns the curve that the budgets follow: fitted to the densities of all latents, or as given."""
        return zipf.fit(density, self.exponent, self.shift)

    def candidates(self, scores: Float[Tensor, "n m"], first_token: int, moment: Moment) -> Entries:
        """Returns entries of some tokens among which those lie that Mutual Choice and Feature Choice would keep.

        Above a number for each latent, and the guess of Mutual Choice, they fill a buffer of fixed size. As many
        entries as a latent needs reach its number, of the largest tile or of all that were looked at when `reduce`
        found it anew: so it takes no guess, but the buffer may be too small.
        """
        if self._is_mutual(moment):
            return super().candidates(scores, first_token, moment)
        total, (n, m) = self.budget(moment), scores.shape  # on any rank: a few may hold most of what is kept
        needed = moment.state["budgets"].to(scores.device) + 1
        if not self._guesses(moment):
            return _union(top_entries(scores, total, first_token), top_of_columns(scores, needed, first_token), m)
        seen = moment.noted = moment.noted or Seen(torch.full_like(scores[0], -torch.inf))
        if n > seen.of:
            seen.of, seen.floors = n, torch.maximum(seen.floors, reached(scores, needed, total + m))
        seen.tokens, kind = seen.tokens + n, torch.finfo(scores.dtype)
        least = torch.minimum(seen.floors, self._floor(moment, scores))
        below = least - kind.eps * least.abs() - kind.tiny  # those that equal it are candidates
        own = OWN_ROOM * (total + m) * n // seen.of
        return entries_above(scores, first_token, below, own + ROOM * total * n // moment.n_tokens + m // 16, moment)

    def reduce(self, entries: Entries, moment: Moment) -> Entries:
        """Returns what both would keep of the entries; in buffers, when twice as many tokens have been looked at."""
        if self._is_mutual(moment):
            return super().reduce(entries, moment)
        seen, total, budgets = moment.noted, self.budget(moment), moment.state["budgets"].to(entries.ids.device)
        if seen and (seen.tokens < 2 * seen.of or seen.tokens == moment.n_tokens):
            return entries
        order, starts = by_rank(entries, len(budgets))
        kept = among_largest(entries.values, total) | (ranks(order, starts) <= budgets[entries.ids])
        if not seen:
            return entries.take(kept)
        floors = _at(entries, order, starts, budgets)
        seen.of, seen.floors = seen.tokens, torch.where(floors.isfinite(), floors.to(seen.floors), seen.floors)
        places = torch.nonzero_static(kept, size=min(len(kept), 2 * total + len(budgets)), fill_value=-1)[:, 0]
        pads, found = places < 0, entries.take(places.clamp_min(0))
        return Entries(found.tokens, found.ids.masked_fill(pads, 0), found.values.masked_fill(pads, -torch.inf))

    def keep(self, entries: Entries, moment: Moment) -> Entries:
        """Returns every latent's largest entries, and takes in densities and thresholds."""
        total = self.budget(moment)
        if not total:
            return entries
        state, m, values = moment.state, len(moment.state["density"]), entries.values
        best = self.best(entries, moment)
        kept, count = best.mask, best.own
        if moment.failed is not None:  # there may be entries of latents that want less, above what was kept
            moment.failed = moment.failed | (best.least <= self._floor(moment, values)[0])
        smallest = smallest_positive(torch.where(best.mask, values, 0.0), moment)
        cut, there = smallest.expand(m), smallest.isfinite()
        if not self._is_mutual(moment):
            budgets, ordered = state["budgets"].to(values.device), self._ordered(state)
            every = self._of_all_data(entries, budgets, moment)
            order, starts = by_rank(every, m)
            own = _among_first(entries, every, order, starts, budgets)
            kept, count = torch.where(ordered.to(values.device), own, kept), len(kept)
            last, following = (_at(every, order, starts, budgets - first) for first in (1, 0))
            own = torch.minimum(last, following)  # of none, or all of the tokens, there is one of them
            own = torch.where(last.isfinite() & following.isfinite(), (last + following) / 2, own)
            cut, there = torch.where(ordered, own, cut), torch.where(ordered, own.isfinite(), there)
        counted = (best.mask if self.density == "mutual" else kept) & (values > 0)
        won = torch.zeros(m, dtype=torch.long, device=values.device).scatter_add_(0, entries.ids, counted.long())
        won = collectives.total(won, moment.mesh.data)
        decay = (1 - 1 / (1 + in_float64(state["steps"]))).clamp_max(self.density_decay)  # the first steps count alike
        state["density"] = torch.lerp(in_float64(won) / moment.n_tokens, state["density"], decay)
        add_to_mean(state, torch.where(there, cut, 0.0).clamp_min(0), self.threshold_decay, only=there)
        state["steps"], state["cut"] = state["steps"] + 1, in_float64(best.least)
        if moment.cut.axis.moves:
            state.update(_as_state(self.curve(moment.cut.whole(state["density"]))))
        if moment.mesh.team.moves:
            return entries.take(kept)
        return entries.take(torch.nonzero_static(kept, size=min(count, total))[:, 0])

    def _of_all_data(self, entries: Entries, budgets: Int[Tensor, "m"], moment: Moment) -> Entries:
        """Returns the candidates of all tokens for the latents of this rank, those left out that none can keep.

        A rank looks for m_i + 1 of each latent: those, and the next one, which is the other side of a cut. Of these the
        tokens' share is rounded up, so that there are at least so many of all ranks at or above the smallest value
        that a rank's share reaches.
        """
        over = moment.mesh.data
        if not over.moves:
            return entries
        order, starts = by_rank(entries, len(budgets))
        share = -(-(budgets + 1) * moment.n_own // moment.n_tokens) - 1
        floors = _at(entries, order, starts, share)
        floors = torch.where(floors.isfinite() | (share < 0).to(floors.device), floors, -torch.inf)
        values = entries.values.to(torch.promote_types(entries.values.dtype, torch.float32))
        least = collectives.smallest(floors.to(values), over)
        wanted = (ranks(order, starts) <= budgets[entries.ids]) & ~(values < least[entries.ids])
        mine = Entries(entries.tokens, entries.ids, values).take(wanted & (values != -torch.inf))
        tokens, ids, values = collectives.gathered(*mine, over=over)
        return Entries(tokens, ids, values.to(entries.values.dtype))

    def moves(self, ledger: Ledger, cut: Cut) -> None:
        """Writes down what Mutual Choice moves, what candidates must reach, these, and how often latents have won.

        Of ranks that hold parts of the latents, what all of their budgets depend on: densities, before and behind the
        step, and fractions that are carried over.
        """
        super().moves(ledger, cut)
        held, (least, most) = cut.blocks * cut.most, self.ks
        always, ever = not self.mutual_share, self.mutual_share < 1
        if ever:
            value = torch.promote_types(ledger.dtype, torch.float32)
            ledger.summed("data", held * value.itemsize, perhaps=not always)
            few, _ = self.gathered(ledger.batch // ledger.ranks("team"), ledger.batch, held)
            _, many = self.gathered(ledger.tokens, ledger.batch, held)
            ledger.gathered("data", bytes_of_rows(torch.zeros(0))[0], perhaps=not always)
            ledger.gathered("data", _bytes(many), perhaps=not always, least=_bytes(few))
        ledger.summed("data", held * DOUBLE)
        carried = cut.latents > least * ledger.batch
        ledger.gathered("latents", 2 * held * DOUBLE, (2, 2))
        if carried:
            ledger.gathered("latents", held * DOUBLE, perhaps=cut.latents <= most * ledger.batch)

    def gathered(self, n: int, batch: int, m: int) -> tuple[int, int]:
        """Returns the tokens' share of the budget; at most, what every latent needs, or all entries."""
        least, most = self.ks
        return min(least * n, n * m), min(most * batch + m, n * m)

    def calibration(self, state: dict[str, Tensor]) -> Tensor | None:
        """Returns each latent's running mean."""
        return torch.where(state["mean.weight"] > 0, mean_of(state), NEVER)

    def report(self, state: dict[str, Tensor]) -> dict[str, float]:
        """Returns the curve, if all densities are known, or it is remembered."""
        fitted = "zipf.r2" in state or "density" not in state
        found = state if fitted else _as_state(self.curve(state["density"]))
        return {name: float(value) for name, value in found.items() if name.startswith("zipf.")}

    def _is_mutual(self, moment: Moment) -> bool:
        return moment.progress < self.mutual_share

    def _ordered(self, state: dict[str, Tensor]) -> Bool[Tensor, ""]:
        """Returns whether it is known how often latents fire, so that there is an order of them."""
        return (state["steps"] > 0).to(state["density"].device)


@dataclass
class Seen:
    """What is known of the tiles looked at so far."""

    floors: Float[Tensor, "m"]
    """A number for each latent that m_i + 1 entries reach, or -inf."""
    of: int = 0
    """The tokens of those entries."""
    tokens: int = 0
    """All that have been looked at."""


def _at(entries: Entries, order: Tensor, starts: Tensor, rank: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Returns each latent's value at a rank, in float64; infinity if there is none."""
    if not len(order):
        return in_float64(torch.full_like(rank, torch.inf, dtype=entries.values.dtype))
    place = starts[:-1] + rank
    there = (rank >= 0) & (place < starts[1:])
    found = in_float64(entries.values[order[torch.where(there, place, 0)]])
    return torch.where(there.to(found.device) & (found > -torch.inf), found, torch.inf)


def _among_first(
    entries: Entries, every: Entries, order: Tensor, starts: Tensor, counts: Int[Tensor, "m"]
) -> Bool[Tensor, "entries"]:
    """Returns which of this rank's entries are among the first so many of their latent, in the order of all ranks'."""
    if not len(order):
        return torch.zeros_like(entries.ids, dtype=torch.bool)
    last = order[(starts[:-1] + counts - 1).clamp_min(0).minimum(starts[1:] - 1).clamp_min(0)]
    token, value = every.tokens[last][entries.ids], every.values[last][entries.ids]
    above, equal = ~(entries.values <= value), entries.values == value
    return (counts > 0)[entries.ids] & (above | (equal & (entries.tokens <= token)))


def _bytes(count: int) -> int:
    """Returns the bytes of so many candidates, as they are gathered."""
    ids = torch.empty(count, dtype=torch.int64, device="meta")
    return bytes_of_rows(*Entries(ids, ids, torch.empty(count, device="meta")))[1]


def _as_state(curve: zipf.Zipf) -> dict[str, Tensor]:
    """Returns a curve as what is remembered: of a rank that does not hold all densities."""
    numbers = {name: getattr(curve, name) for name in ("exponent", "shift", "r2")}
    return {f"zipf.{name}": torch.as_tensor(value, dtype=torch.float64) for name, value in numbers.items()}


def _union(a: Entries, b: Entries, m: int) -> Entries:
    """Returns the entries of both, each once, sorted by (token, latent)."""
    both = Entries.cat([a, b])
    order = torch.argsort(both.tokens * m + both.ids, stable=True)
    both = both.take(order)
    keys = both.tokens * m + both.ids
    new = torch.ones_like(keys, dtype=torch.bool)
    new[1:] = keys[1:] != keys[:-1]
    return both.take(new)
