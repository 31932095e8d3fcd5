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
from jaxtyping import Float
from torch import Tensor

from sae.base import zipf
from sae.base.errors import ConfigError
from sae.base.settings import choose
from sae.base.sums import in_float64
from sae.kernels.codes import Entries, Support, where
from sae.kernels.largest import ranks, top_entries, top_of, top_of_columns
from sae.selection import NEVER, Moment, Selection
from sae.selection.mutual_choice import MutualChoice, add_to_mean, mean_of, running_mean


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
        """Deals out the budgets of the step."""
        state, total, m = moment.state, self.budget(moment), len(moment.state["density"])
        wanted, most = total * zipf.ranked(self.curve(state).shares(m), state["density"]), max(1, moment.n_tokens)
        if m <= total:
            state["budgets"] = zipf.budgets(wanted, total, most, least=1)
            return
        wanted = zipf.fill(wanted, total, most, least=0) + state["carry"]
        state["budgets"] = zipf.budgets(wanted, total, most, least=0)
        if not self._mutual(moment):
            state["carry"] = (wanted - state["budgets"]).clamp(-1, 1)

    def curve(self, state: dict[str, Tensor]) -> zipf.Zipf:
        """Returns the curve that the budgets follow: fitted, or as given."""
        return zipf.fit(state["density"], self.exponent, self.shift)

    def candidates(self, scores: Float[Tensor, "n m"], first_token: int, moment: Moment) -> Entries:
        """Returns what Mutual Choice and Feature Choice would keep of some tokens."""
        mutual = top_entries(scores, self.budget(moment), first_token)
        if self._mutual(moment):
            return mutual
        own = top_of_columns(scores, moment.state["budgets"].to(scores.device) + 1, first_token)
        return _union(mutual, own, scores.shape[1])

    def candidates_of(self, n: int, batch: int, m: int) -> tuple[int, int]:
        """Returns what Mutual Choice would; at most, with every latent's own entries and the next one of each."""
        least, mutual = super().candidates_of(n, batch, m)
        return least, min(mutual + self.k * batch + m, n * m)

    def reduce(self, entries: Entries, moment: Moment) -> Entries:
        """Returns what both would keep of the entries."""
        mutual = top_of(entries, self.budget(moment))
        if self._mutual(moment):
            return mutual
        budgets = moment.state["budgets"].to(entries.ids.device)
        return _union(mutual, entries.take(ranks(entries, len(budgets)) <= budgets[entries.ids]), len(budgets))

    def floors(self, entries: Entries, n_tokens: int, m: int, moment: Moment) -> Float[Tensor, "m"]:
        """Returns what Mutual Choice needs, or the value that a latent's share of m_i + 1 entries reach, if less.

        Shares are rounded up, so that those of all parts are at least m_i + 1; the next one is the other side of a cut.
        """
        mutual = super().floors(entries, n_tokens, m, moment)
        if self._mutual(moment) or not n_tokens:
            return mutual
        budgets = moment.state["budgets"].to(entries.ids.device)
        last = -(-(budgets + 1) * n_tokens // moment.n_tokens) - 1
        there = ranks(entries, m) == last[entries.ids]
        own = torch.full_like(mutual, -torch.inf)
        own[entries.ids[there]] = entries.values[there]
        return torch.minimum(mutual, own)

    def keep(self, entries: Entries, moment: Moment) -> Entries:
        """Returns every latent's largest entries, and takes in densities and thresholds."""
        state, m, by_mutual = moment.state, len(moment.state["density"]), self._mutual(moment)
        mutual = top_of(entries, self.budget(moment))
        budgets = state["budgets"].to(entries.ids.device)
        rank = ranks(entries, m)
        kept = mutual if by_mutual else entries.take(rank < budgets[entries.ids])
        counted = mutual if self.density == "mutual" else kept
        won = in_float64(torch.bincount(counted.ids[counted.values > 0], minlength=m)) / max(1, moment.n_tokens)
        decay = min(self.density_decay, 1 - 1 / (1 + int(state["steps"])))  # the first steps count alike
        state["density"] = torch.lerp(won, state["density"], decay)
        state["steps"] = state["steps"] + 1
        if by_mutual:
            positive = mutual.values[mutual.values > 0]
            if len(positive):
                add_to_mean(state, positive.min().expand(m), self.threshold_decay)
            return kept
        cut = [_value_at(entries, rank == budgets[entries.ids] - first, m) for first in (1, 0)]
        both = cut[0].isfinite() & cut[1].isfinite()
        cut = torch.where(both, sum(cut) / 2, torch.minimum(*cut))  # none or all of the tokens are within the budget
        add_to_mean(state, cut.clamp_min(0), self.threshold_decay, only=cut.isfinite())
        return kept

    def calibration(self, state: dict[str, Tensor]) -> Tensor | None:
        """Returns each latent's running mean."""
        return torch.where(state["mean.weight"] > 0, mean_of(state), NEVER)

    def report(self, state: dict[str, Tensor]) -> dict[str, float]:
        """Returns the curve."""
        curve = self.curve(state)
        return {f"zipf.{name}": float(getattr(curve, name)) for name in ("exponent", "shift", "r2")}

    def _mutual(self, moment: Moment) -> bool:
        known = bool(moment.state["steps"])  # how often latents fire, so that there is an order of them
        return moment.progress < self.mutual_share or not known


def _value_at(entries: Entries, where: Tensor, m: int) -> Float[Tensor, "m"]:
    """Returns each latent's value at its one entry where `where` is true, infinity if there is none."""
    values = in_float64(entries.values[where])
    found = values.new_full((m,), torch.inf)
    found[entries.ids[where].to(found.device)] = values
    return found


def _union(a: Entries, b: Entries, m: int) -> Entries:
    """Returns the entries of both, each once, sorted by (token, latent)."""
    both = Entries.cat([a, b])
    order = torch.argsort(both.tokens * m + both.ids, stable=True)
    both = both.take(order)
    keys = both.tokens * m + both.ids
    new = torch.ones_like(keys, dtype=torch.bool)
    new[1:] = keys[1:] != keys[:-1]
    return both.take(new)
