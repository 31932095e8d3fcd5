"""What a rank moves in a step, as those that move it say: over which ranks, how many bytes, by how many collectives.

Each says so beside the code that does it, by a method `moves`; where a mesh has one rank along an axis, nothing is
written down. What data decides is told by its least and its most.
"""

from dataclasses import dataclass, field

import torch

from sae.parallel.mesh import Shape

Ends = tuple[float, float]
"""The least and the most."""
ONCE = (1, 1)


@dataclass(frozen=True)
class Moved:
    """What one rank moves over some ranks in a step."""

    ranks: int
    sent: Ends = (0, 0)
    """Bytes that it hands to collectives."""
    received: Ends = (0, 0)
    """Bytes that come to it: of a sum over a ring of N 2 (N - 1) / N of it, of what is gathered N - 1 times as much."""
    collectives: Ends = (0, 0)

    def __add__(self, other: "Moved") -> "Moved":
        pairs = zip(self._ends, other._ends, strict=True)
        return Moved(self.ranks, *((a[0] + b[0], a[1] + b[1]) for a, b in pairs))

    @property
    def _ends(self) -> tuple[Ends, Ends, Ends]:
        return self.sent, self.received, self.collectives


@dataclass
class Ledger:
    """What a step moves, of the rank that has most tokens and latents, by axes of the mesh."""

    shape: Shape
    tokens: int
    """Of a batch, that such a rank trains on."""
    batch: int
    """Tokens of a batch."""
    dtype: torch.dtype = torch.float32
    """Of pre-activations."""
    passes: Ends = ONCE
    """Micro-batches, by which some things move."""
    tiles: Ends = ONCE
    """Tiles of tokens of which latents are chosen, by which others do."""
    moved: dict[str, Moved] = field(default_factory=dict)
    """By axis: sites, data, latents, team (the ranks along data and latents together) and all."""

    def ranks(self, over: str) -> int:
        """Returns how many there are along an axis."""
        shape = self.shape
        team = shape.data * shape.latents
        return {"team": team, "all": shape.sites * team}[over] if over in ("team", "all") else getattr(shape, over)

    def summed(self, over: str, *sizes: float, times: Ends = ONCE, perhaps: bool = False) -> None:
        """Writes down so many bytes that are summed, or of which the smallest or largest is taken, in so many parts.

        `perhaps`: data decides whether they are.
        """
        n = self.ranks(over)
        for size in sizes:
            self._add(over, (size, size), 2 * (n - 1) / n, times, perhaps)

    def gathered(
        self, over: str, size: float, times: Ends = ONCE, perhaps: bool = False, least: float | None = None
    ) -> None:
        """Writes down the same of bytes of which every rank gets those of every other one; `least` is the least."""
        self._add(over, (size if least is None else least, size), self.ranks(over) - 1, times, perhaps)

    def exchanged(self, over: str, sent: float, received: float) -> None:
        """Writes down an exchange in which each rank has other bytes for each other."""
        if self.ranks(over) > 1:
            self._write(over, Moved(self.ranks(over), (sent, sent), (received, received), ONCE))

    def _add(self, over: str, size: Ends, factor: float, times: Ends, perhaps: bool) -> None:
        if self.ranks(over) == 1:
            return
        sure = not perhaps
        sent = (size[0] * sure, size[1])
        received = (sent[0] * factor, sent[1] * factor)
        self._write(over, Moved(self.ranks(over), sent, received, (times[0] * sure, times[1])))

    def _write(self, over: str, moved: Moved) -> None:
        self.moved[over] = self.moved[over] + moved if over in self.moved else moved
