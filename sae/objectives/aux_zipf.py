"""aux_zipf: latents that fire less than their rank lets expect learn to explain the residual (Ayonrinde 2411.02124).

    w_i = clip(1 - f_i / (tau p_i), 0, 1)
    e^  = (w * ReLU(TopK_kaux(h restricted to w > 0))) W_dec         L = sum_t |e_t - e^_t|^2 / (N V_e)

f_i is the running density of latent i and p_i the density that the Zipf curve fitted to all of them gives its rank. So
a dead latent counts in full, one that is dying (f_i < tau p_i) in part. The paper says that its loss generalizes AuxK
to under-used features and gives no formula in the text at hand; this is a reading of it. With w_i = 1 for dead latents
and 0 for all others it is AuxK bit for bit: only the members differ.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.base import zipf
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.objectives import Objective, Start
from sae.objectives.auxk import AuxK, Members, members
from sae.parallel.ledger import Ledger
from sae.selection import Selection


@Objective.register_subclass("aux_zipf")
@dataclass(frozen=True)
class AuxZipf(AuxK):
    """The auxiliary loss that revives dead latents and helps under-used ones."""

    tau: float = 0.5
    """Share of its expected density under which a latent counts as under-used."""

    def validate(self, d_sae: int, selection: Selection, n_blocks: int = 1) -> None:
        """Raises ConfigError unless tau is positive and k fits."""
        super().validate(d_sae, selection, n_blocks)
        if not self.tau > 0:
            raise ConfigError(f"objectives.aux_zipf.tau: {self.tau} must be positive")

    def report(self, density: Float[Tensor, "d_sae"], dead: Bool[Tensor, "d_sae"]) -> dict[str, float]:
        """Returns the share of latents that live, but fire less than tau times as often as their rank lets expect."""
        lacking = shortfall(density, dead, self.tau) > 0
        return {"dying_share": float((lacking & ~dead.to(lacking.device)).float().mean())}

    def moves(self, ledger: Ledger, coder: SparseCoder) -> None:
        """Writes down what AuxK moves, at each step, and all densities with who is dead, before and behind it."""
        self._moves(ledger, coder, perhaps=False)
        if coder.shard:
            cut = coder.shard.cut
            every = cut.blocks * cut.most
            ledger.gathered("latents", 2 * every * (torch.float64.itemsize + torch.bool.itemsize), (4, 4))

    def begin(self, start: Start) -> Members | None:
        """Returns the under-used latents, which may be all."""
        dead, cut = start.dead, start.cut
        shares = cut.own(shortfall(cut.whole(start.density), cut.whole(dead), self.tau))
        return members(shares.to(dead.device, torch.float32), max(cut.latents, len(dead)), cut)


def shortfall(density: Float[Tensor, "d_sae"], dead: Bool[Tensor, "d_sae"], tau: float = 0.5) -> Float[Tensor, "d_sae"]:
    """Returns w: 1 for a dead latent, 0 for one that fires at least tau times as often as expected.

    It lies where the densities do.
    """
    dead, total = dead.to(density.device), density.sum()
    expected = total * zipf.ranked(zipf.fit(density).shares(len(density)), density)
    lacking = (1 - density / (tau * expected)).clamp(0, 1)
    return torch.where(dead, 1.0, torch.where(total > 0, lacking, 0.0))  # before the first step nothing is known
