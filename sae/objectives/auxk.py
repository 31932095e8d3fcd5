"""AuxK: dead latents learn to explain what the living ones leave over (Gao 2024, arXiv 2406.04093, appendix A.2).

    e = stop_gradient(x - x^)        e^ = ReLU(TopK_kaux(h restricted to dead latents)) W_dec
    L = sum_t |e_t - e^_t|^2 / (N V_e)

V_e is the residual's variance at the previous step (the paper divides by the current batch's own; the previous one
makes micro-batches and ranks exact). No bias enters e^. The gradient reaches encoder and decoder of dead latents only,
and the term is exactly 0 while no latent is dead.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.coder import Choice, SparseCoder
from sae.coder.shard import best_of, moves_lists, moves_output
from sae.coder.spec import CoderSpec
from sae.kernels.codes import PAD, SparseLatents, by_rows
from sae.objectives import Objective, Start, Step, zero
from sae.parallel import collectives
from sae.parallel.cut import NO_LATENTS, Cut
from sae.parallel.ledger import Ledger
from sae.selection import Selection


@Objective.register_subclass("auxk")
@dataclass(frozen=True)
class AuxK(Objective):
    """The auxiliary loss that revives dead latents."""

    of_latents: ClassVar[bool | None] = False
    weight: float = 1 / 32
    k: int = 0
    """Dead latents used per token; 0 means the power of two nearest to d_out / 2."""

    def validate(self, d_sae: int, selection: Selection, n_blocks: int = 1) -> None:
        """Raises ConfigError unless 0 <= k <= d_sae."""
        if not 0 <= self.k <= d_sae:
            name = Objective.get_choice_name(type(self))
            raise ConfigError(f"objectives.{name}.k: {self.k} is not between 0 and d_sae = {d_sae}")

    def begin(self, start: Start) -> "Members | None":
        """Returns the dead latents; None where the host knows that there are none."""
        return members(start.dead.to(torch.float32), start.may_be_dead, start.cut)

    def entries(self, spec: CoderSpec) -> int:
        """Returns the latents used per token, as if there were so many."""
        return min(self.k or nearest_power_of_two(spec.d_out / 2), spec.d_sae)

    def choose(self, coder: SparseCoder, scores: Float[Tensor, "n d_sae"], begun: "Members | None") -> Choice | None:
        """Returns the largest of the members' entries for every token; those that are not positive only fill up."""
        if begun is None:
            return None
        own = scores[:, begun.ids].masked_fill_(begun.shares == 0, -torch.inf)
        columns, kept = best_of(own, self.entries(coder.whole), begun.cut, begun.most)
        values = own.gather(1, columns).flatten()
        return Choice(*by_rows(begun.ids[columns]), torch.where((values > 0) & kept.flatten(), values, PAD))

    def moves(self, ledger: Ledger, coder: SparseCoder) -> None:
        """Writes down, of steps in which latents may be dead, whether any is, the members' largest, and what they make.

        Of fewer members than a token may use, lists are shorter.
        """
        self._moves(ledger, coder, perhaps=True)

    def _moves(self, ledger: Ledger, coder: SparseCoder, perhaps: bool) -> None:
        if coder.shard:
            ledger.summed("latents", torch.int32.itemsize, perhaps=perhaps)
            moves_lists(ledger, coder.shard.cut, self.entries(coder.whole), ledger.dtype, perhaps)
            moves_output(ledger, coder.d_out, coder.dtype, perhaps=perhaps)

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the normalized error of the members' explanation of the residual."""
        if step.begun is None or step.beside is None:
            return zero(step)
        coder, (offsets, ids, *_), found = step.coder, step.beside, step.begun
        kept = coder.preactivations_at(step.run.y.detach(), step.beside)
        values = torch.relu(kept) * found.of_all.to(kept).index_select(0, ids)
        codes = SparseLatents(offsets, ids, values, coder.spec.d_sae)
        square = coder.fit(codes, step.run.error.new_zeros(coder.spec.d_out), step.run.error)[1]
        unlike = step.n_tokens * step.residual_variance.to(square.dtype)
        return torch.where(found.any, square / unlike, 0.0)


class Members(NamedTuple):
    """The latents that are to explain what is left over, and how much each counts."""

    ids: Int[Tensor, "c"]
    """Ascending; there may be more places than latents."""
    shares: Float[Tensor, "c"]
    """0 at a place that holds none."""
    of_all: Float[Tensor, "d_sae"]
    any: Bool[Tensor, ""]
    """Whether there is one, on any rank."""
    cut: Cut
    """How latents are cut over ranks that hold parts of the coder."""
    most: int
    """Places, in a block of latents, of the rank that has most."""


def members(shares: Float[Tensor, "d_sae"], at_most: int, cut: Cut = NO_LATENTS) -> Members | None:
    """Returns the latents whose share is positive, of which there are no more than `at_most`, here and elsewhere.

    With `cut`, this rank holds a part of the coder's latents, and the shares are theirs.
    """
    if not at_most:
        return None
    anybody = (shares > 0).any()
    if not cut.axis.moves:
        return Members(*_gathered(shares, at_most), shares, anybody, cut, at_most)
    anybody = collectives.largest(anybody.int(), cut.axis) > 0
    if cut.blocks > 1:  # a place for each, so that it is known to which block it belongs
        return Members(*_gathered(shares, len(shares)), shares, anybody, cut, cut.most)
    return Members(*_gathered(shares, min(at_most, len(shares))), shares, anybody, cut, min(at_most, cut.most))


def _gathered(shares: Float[Tensor, "d_sae"], places: int) -> tuple[Int[Tensor, "c"], Float[Tensor, "c"]]:
    """Returns the ids of those whose share is positive, at so many places, and the shares there.

    With a place for each, each has its own: ids that are repeated would be as many as all, and be taken for them.
    """
    if places == len(shares):
        return torch.arange(places, device=shares.device), shares
    ids = torch.nonzero_static(shares > 0, size=places, fill_value=len(shares) - 1)[:, 0]
    first = torch.arange(places, device=ids.device) < (shares > 0).sum()
    return ids, torch.where(first, shares[ids], 0.0)


def nearest_power_of_two(value: float) -> int:
    """Returns the power of two nearest to `value` on the logarithmic scale, at least 1."""
    return max(1, 2 ** round(math.log2(value)))
