"""Matryoshka: every prefix of the latents is to reconstruct by itself (Bussmann 2025, arXiv 2503.17547).

    L = mean over the prefixes {none, m_1, ..., m_G = d_sae} of sum_t |x_t - x^(m)_t|^2 / (N V)

x^(m) decodes the entries of the full selection that lie among the first m latents; there is one selection over the full
width, so prefixes have fewer active latents. The term takes the place of `reconstruction`, whose weight is then 0.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.shard import moves_output
from sae.kernels.codes import counted, offsets_of
from sae.objectives import Objective, Step
from sae.parallel.ledger import Ledger
from sae.selection import Selection


@Objective.register_subclass("matryoshka")
@dataclass(frozen=True)
class Matryoshka(Objective):
    """Mean squared error of nested prefixes, over the variance of the target."""

    of_latents: ClassVar[bool | None] = False
    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Ends of the prefixes as shares of the latents, ascending; the last is 1."""

    def validate(self, d_sae: int, selection: Selection, n_blocks: int = 1) -> None:
        """Raises ConfigError unless every prefix has more latents than the one before, and the last all."""
        stops = [round(share * d_sae / n_blocks) for share in (0.0, *self.prefixes)]
        if any(after <= before for before, after in pairwise(stops)) or self.prefixes[-1:] != (1,):
            raise ConfigError(
                f"objectives.matryoshka.prefixes: {list(self.prefixes)} must grow from above 0 to 1, each by at least "
                f"one of {d_sae // n_blocks} latents"
            )

    def moves(self, ledger: Ledger, coder: SparseCoder) -> None:
        """Writes down what each prefix adds to the output, all at once."""
        moves_output(ledger, coder.d_out, coder.dtype, times=len(self.prefixes))

    def loss(self, step: Step) -> Float[Tensor, ""]:
        """Returns the mean over the prefixes, that of no latents included."""
        latents, coder = step.run.latents, step.coder
        size = coder.whole.d_sae // coder.whole.n_blocks  # a cross-layer coder has prefixes in every block
        ids = coder.shard.cut.ids(latents.ids) if coder.shard else latents.ids
        stops, place = [round(share * size) for share in self.prefixes], ids % size
        part = torch.stack([place >= stop for stop in stops[:-1]]).sum(0) if stops[:-1] else torch.zeros_like(place)
        rows = part * latents.n_tokens + latents.tokens
        # Decoded at once, part after part, so that the host need not know how many entries each has.
        order, offsets = torch.argsort(rows, stable=True), offsets_of(counted(rows, len(stops) * latents.n_tokens))
        parts = coder.decoded(latents.values.index_select(0, order), offsets, latents.ids[order])
        made, total = step.run.rest, self._square(step, step.run.rest)
        for added in parts.unflatten(0, (len(stops), latents.n_tokens)).unbind():
            made = made + added
            total = total + self._square(step, made)
        return step.share(total / (len(self.prefixes) + 1))

    def _square(self, step: Step, made: Float[Tensor, "n d_out"]) -> Float[Tensor, ""]:
        return step.coder.weighted(step.target - made).square().sum()
