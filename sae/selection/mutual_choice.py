"""Mutual Choice: a batch of B tokens keeps its k B largest affinities, wherever they lie (Ayonrinde, arXiv 2411.02124).

    choose S in {0, 1}^(B x d_sae) with sum S <= k B that maximizes sum S * A

A is the matrix of pre-activations. So a token that needs many latents gets many, and a latent may win any number of
tokens. BatchTopK (Bussmann 2024, arXiv 2412.06410) is the same rule; `batch_topk`, its other name, is this class.

Sources are certain about the rule. Read from the sibling paper: outside training, where a token must not see its
neighbors, every affinity above one global threshold is kept, the running mean of the smallest positive one kept in a
batch (2412.06410, equation 8); it is stored in the spec. Before it is calibrated, each token keeps its own k largest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.sums import in_float64
from sae.kernels import kernel, top_ids
from sae.kernels.codes import Entries, Support, by_rows, where
from sae.kernels.largest import among_largest, top_entries, top_of
from sae.kernels.radix import Kept, histograms, largest_of_parts
from sae.parallel import collectives
from sae.parallel.cut import Cut
from sae.parallel.ledger import Ledger
from sae.selection import Budget, Factors, Moment, Owned, Selection
from sae.selection.jumprelu import JumpReLU

DOUBLE = 8  # bytes
BELOW = 0.1  # candidates reach so far below the cut of the step before, as a share of it,
ROOM = 4  # and there is room for so many times as many as are kept


@Selection.register_subclass("batch_topk")
@Selection.register_subclass("mutual_choice")
@dataclass(frozen=True)
class MutualChoice(Budget):
    """Keeps the k x batch largest of the batch."""

    batch_wide: ClassVar[bool] = True
    ranks: ClassVar[bool] = True
    beside_scores: ClassVar[float] = 0.6
    units: ClassVar[Mapping[str, str] | None] = {"calibration": "scores"}
    threshold_decay: float = 0.95
    """Decay, per step, of the running mean that becomes the threshold at inference."""

    def validate(self, d_sae: int) -> None:
        """Raises ConfigError unless 1 <= k <= d_sae and the decay is one."""
        super().validate(d_sae)
        if not 0 <= self.threshold_decay < 1:
            raise ConfigError(f"selection.threshold_decay: {self.threshold_decay} is not at least 0 and below 1")

    def competes(self, calibrated: bool) -> str:
        """Returns "nothing" once there is a threshold, in whose place k are kept before."""
        return "nothing" if calibrated else self.over

    def unit(self, m: int) -> int | None:
        """Returns 1: ranks agree on a cut through all affinities."""
        return 1

    def rescaled(self, own: dict[str, Tensor], calibration: tuple[float, ...], by: Factors) -> Owned:
        """Returns JumpReLU, which it is at inference, where latents come to have thresholds of their own."""
        if by.even or not calibration or by.by_norm:
            return super().rescaled(own, calibration, by)
        cuts = [cut * factor for cut, factor in zip(torch.tensor(calibration), by.compared, strict=True)]
        return JumpReLU(), {"threshold": torch.cat(cuts).float()}, ()

    def infer(self, scores: Float[Tensor, "n m"], tensors: Mapping[str, Tensor]) -> Support:
        """Returns the entries above the calibrated threshold."""
        threshold = tensors.get("calibration")
        return by_rows(top_ids(scores, self.k)) if threshold is None else where(scores > threshold)

    def start(self, m: int) -> dict[str, Tensor]:
        """Returns an empty running mean of the cut; after the first step there is beside it the `cut` of the last."""
        return running_mean()

    def budget(self, moment: Moment) -> int:
        """Returns how many entries the batch keeps."""
        return self.k_at(moment.progress) * moment.n_tokens

    def candidates(self, scores: Float[Tensor, "n m"], first_token: int, moment: Moment) -> Entries:
        """Returns entries of some tokens among which the largest are.

        They are those well below the cut of the step before, in a buffer of fixed size, so that the host need not know
        how many they are; what fills it up is -inf. A buffer that is too small, or a cut that has fallen farther, fails
        the step, which is repeated with the largest of all entries.
        """
        if not self._guesses(moment):
            return top_entries(scores, self.budget(moment), first_token)
        n, m = scores.shape
        room = ROOM * self.k_at(moment.progress) * n + m // 16 + 64
        return entries_above(scores, first_token, self._floor(moment, scores), room, moment)

    def _floor(self, moment: Moment, like: Tensor) -> Float[Tensor, "1"]:
        """Returns what candidates are above, well below the cut of the step before."""
        cut = moment.state["cut"]
        return (cut - BELOW * cut.abs()).to(like.device, like.dtype).reshape(1)

    def _guesses(self, moment: Moment) -> bool:
        """Returns whether candidates are found by the last step's cut."""
        return "cut" in moment.state and not moment.careful

    def reduce(self, entries: Entries, moment: Moment) -> Entries:
        """Returns the largest of the entries; all, where their number is fixed anyway."""
        return entries if self._guesses(moment) else top_of(entries, self.budget(moment))

    def keep(self, entries: Entries, moment: Moment) -> Entries:
        """Returns the largest of the entries, and takes the smallest positive one into the running mean."""
        if not self.budget(moment):
            return entries
        best = self.best(entries, moment)
        kept = entries.take(torch.nonzero_static(best.mask, size=best.own)[:, 0])
        moment.state["cut"] = in_float64(best.least)
        if moment.failed is not None:  # what fills up was kept: there were too few candidates
            moment.failed = moment.failed | (best.least == -torch.inf)
        smallest = smallest_positive(kept.values, moment)
        add_to_mean(moment.state, smallest, self.threshold_decay, only=smallest.isfinite())
        return kept

    def best(self, entries: Entries, moment: Moment) -> Kept:
        """Returns which entries are among the largest of the batch; ranks agree on the cut, of which each tells."""
        count, values = self.budget(moment), entries.values
        if not moment.mesh.team.moves:
            mask = among_largest(values, count)
            return Kept(mask, min(count, len(values)), torch.where(mask, values, torch.inf).min())
        of_all = Entries(entries.tokens, moment.cut.ids(entries.ids), values)
        return largest_of_parts(of_all, moment.cut.latents, count, partial(collectives.total, over=moment.mesh.team))

    def moves(self, ledger: Ledger, cut: Cut) -> None:
        """Writes down a histogram for every digit and the smallest kept; those of places, where the cut is tied."""
        digits, places = histograms(ledger.dtype)
        for digit in digits:
            ledger.summed("team", digit.nbytes)
        for place in places:
            ledger.summed("team", place.nbytes, perhaps=True)
        ledger.summed("team", DOUBLE)

    def calibration(self, state: dict[str, Tensor]) -> Tensor | None:
        """Returns the running mean of the cut."""
        return mean_of(state) if state["mean.weight"] > 0 else None

    def report(self, state: dict[str, Tensor]) -> dict[str, float]:
        """Returns the threshold that inference would use now."""
        found = self.calibration(state)
        return {} if found is None else {"threshold": float(found)}


def smallest_positive(values: Float[Tensor, "kept"], moment: Moment) -> Float[Tensor, ""]:
    """Returns the smallest value above 0 that any rank keeps, in float64; infinity if there is none."""
    own = torch.where(values > 0, values, torch.inf)
    return collectives.smallest(in_float64(torch.cat([own, own.new_full((1,), torch.inf)]).min()), moment.mesh.team)


def entries_above(
    scores: Float[Tensor, "n m"], first_token: int, cuts: Float[Tensor, "m_or_1"], room: int, moment: Moment
) -> Entries:
    """Returns the entries above their cuts in a buffer of fixed size; what fills it up is -inf, of the first latent.

    If it is too small, the step has failed.
    """
    n, m = scores.shape
    room = min(n * m, room)
    if not room:
        none = torch.zeros(0, dtype=torch.long, device=scores.device)
        return Entries(none, none, scores.flatten())
    _, places, count = kernel("above", scores)(scores, cuts, room)
    failed = count > room
    moment.failed = failed if moment.failed is None else moment.failed | failed
    pads, places = places < 0, places.clamp_min(0)
    values = torch.where(pads, -torch.inf, scores.reshape(-1).index_select(0, places))
    return Entries(torch.div(places, m, rounding_mode="floor") + first_token, places % m, values)


def running_mean(m: int | None = None) -> dict[str, Tensor]:
    """Returns the state of a bias-corrected running mean of one number, or of m."""
    shape = () if m is None else (m,)
    return {"mean.sum": torch.zeros(shape, dtype=torch.float64), "mean.weight": torch.zeros(shape, dtype=torch.float64)}


def add_to_mean(state: dict[str, Tensor], value: Tensor, decay: float, only: Tensor | None = None) -> None:
    """Takes a value into a running mean; of m of them, those in `only`."""
    found = {
        "mean.sum": torch.lerp(in_float64(value), state["mean.sum"], decay),
        "mean.weight": decay * state["mean.weight"] + (1 - decay),
    }
    for name, new in found.items():
        state[name] = new if only is None else torch.where(only.to(new.device), new, state[name])


def mean_of(state: dict[str, Tensor]) -> Tensor:
    """Returns a running mean; NaN where it has no value yet."""
    return state["mean.sum"] / state["mean.weight"]
