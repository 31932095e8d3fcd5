"""How latents are cut over ranks: equal blocks, of each of which every rank along an axis holds neighbors.

So what one rank holds of a block is before what the next one holds, and a cross-layer coder is cut inside every layer.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from sae.parallel import collectives
from sae.parallel.ranks import ITSELF, Axis


@dataclass(frozen=True)
class Cut:
    """Some latents, and which of them this rank holds."""

    size: int
    """Of a block."""
    blocks: int = 1
    axis: Axis = ITSELF
    unit: int = 1
    """Neighbors that stay together; a block is a multiple of it."""

    @property
    def latents(self) -> int:
        """Returns how many there are."""
        return self.size * self.blocks

    @property
    def held(self) -> int:
        """Returns how many this rank holds."""
        return len(self.part()) * self.blocks

    @property
    def most(self) -> int:
        """Returns how many of a block any rank holds at the most."""
        return -(-self.size // self.unit // self.axis.world_size) * self.unit

    def part(self, rank: int | None = None) -> range:
        """Returns which of every block a rank holds, this one if none is named."""
        own = replace(self.axis, rank=self.axis.rank if rank is None else rank).of(self.size // self.unit)
        return range(own.start * self.unit, own.stop * self.unit)

    def pieces(self) -> list[range]:
        """Returns which latents this rank holds, block by block."""
        own = self.part()
        return [range(first + own.start, first + own.stop) for first in range(0, self.latents, self.size)]

    def ids(self, own: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """Returns the numbers, among all, of latents that this rank holds, given their numbers among those."""
        if not self.axis.moves:
            return own
        part = self.part()
        block = torch.div(own, max(1, len(part)), rounding_mode="floor")
        return own + part.start + block * (self.size - len(part))

    def own(self, every: Shaped[Tensor, "latents *d"]) -> Shaped[Tensor, "held *d"]:
        """Returns, of what there is for every latent, that of those that this rank holds."""
        if not self.axis.moves:
            return every
        part = self.part()
        return every.unflatten(0, (self.blocks, self.size))[:, part.start : part.stop].flatten(0, 1)

    def whole(self, own: Shaped[Tensor, "held *d"]) -> Shaped[Tensor, "latents *d"]:
        """Returns for every latent what the rank that holds it has; all ranks along the axis must ask."""
        if not self.axis.moves:
            return own
        held = own.unflatten(0, (self.blocks, -1)) if len(own) else own.reshape(self.blocks, 0, *own.shape[1:])
        padded = own.new_zeros(self.blocks, self.most, *own.shape[1:])
        padded[:, : held.shape[1]] = held
        every = collectives.stacked(padded, self.axis)
        parts = [part[:, : len(self.part(rank))] for rank, part in enumerate(every.unbind())]
        return torch.cat(parts, dim=1).flatten(0, 1)


NO_LATENTS = Cut(0)
