"""What ranks read of a batch, brought to those that train on it.

    lanes  ->  sites: each group of ranks gets the rows at the sites that its coders read or write, of all that it needs
           ->  latents: each rank of a group gets the rows of all of them

Every rank then has the rows of its place along data, in the order of lanes. A lane draws as many tokens as any other,
so that all know how many rows come from where, and no numbers are moved before. Of batches of whole rows of text, the
text moves first, and says how many of its positions count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.parallel import collectives
from sae.parallel.ledger import Ledger
from sae.parallel.mesh import Mesh
from sae.parallel.ranks import Share
from sae.stream.batch import ActivationBatch, TextBatch

ELSEWHERE = -1
"""The block of a row of an exchanged batch: the ranks that have read it know."""
WORD = 8  # bytes: what comes from a rank begins where a number of any type may


@dataclass(frozen=True)
class Wanted:
    """What the coders of a group of ranks need of a batch, by names of sites."""

    activations: tuple[str, ...]
    gradients: tuple[str, ...] = ()


class Exchange:
    """Brings rows to where coders are trained; all ranks must call it at the same step."""

    def __init__(self, mesh: Mesh, wanted: Sequence[Wanted], units: int, of: int) -> None:
        """Takes what each group along sites wants, and of what a batch is made: lanes or rows, of so many tokens."""
        self.mesh, self.wanted, self.of = mesh, wanted, of
        shape = mesh.shape
        together, lanes = shape.latents * shape.sites, shape.latents * shape.sites * shape.data
        first = mesh.data.rank * together
        self.units = [len(Share(first + number, lanes).of(units)) for number in range(together)]
        """Of the ranks with this one's place along data, in the order of lanes."""

    def __call__(self, batch: ActivationBatch) -> ActivationBatch:
        """Returns the rows of all ranks with this one's place along data, at the sites that its coders need."""
        if not (self.mesh.sites.moves or self.mesh.latents.moves):
            return batch
        text, counts = None, [units * self.of for units in self.units]
        if batch.text is not None:
            text = self._text(batch.text)
            counts = [int(rows.sum()) for rows in text.keep.split(self.units)]
        sent = [
            [
                *(batch.activations[name] for name in want.activations),
                *(batch.gradients[name] for name in want.gradients),
            ]
            for want in self.wanted
        ]
        own = self.wanted[self.mesh.sites.rank]
        found = self._moved(sent, counts)
        n = len(own.activations)
        return ActivationBatch(
            dict(zip(own.activations, found[:n], strict=True)),
            dict(zip(own.gradients, found[n:], strict=True)),
            torch.full((sum(counts),), ELSEWHERE),
            text,
        )

    def _text(self, own: TextBatch) -> TextBatch:
        """Returns the text of all of them; what the model has made of it stays where it is."""
        columns = [own.tokens, own.keep.to(own.tokens.dtype)]
        tokens, keep = self._moved([columns] * len(self.wanted), self.units)
        return TextBatch(tokens, keep.bool())

    def _moved(self, sent: list[list[Tensor]], counts: list[int]) -> list[Tensor]:
        """Returns, of columns that each group along sites is sent, those of this one with the rows of all.

        `counts` says how many rows each rank has, in the order of lanes.
        """
        sites, latents = self.mesh.sites, self.mesh.latents
        like = sent[sites.rank]
        row = sum(map(_row_bytes, like))
        sources = [counts[place : place + sites.world_size] for place in range(0, len(counts), sites.world_size)]
        sizes = [[row * n for n in group] for group in sources]
        flat = torch.cat([_bytes(column) for columns in sent for column in columns])
        given = [sum(column.nbytes for column in columns) for columns in sent]
        came = collectives.exchanged(flat, given, sizes[latents.rank], sites)
        if latents.moves:
            most = -(-max(map(sum, sizes)) // WORD) * WORD
            padded = came.new_zeros(most)
            padded[: len(came)] = came
            parts = collectives.stacked(padded, latents).unbind()
        else:
            parts = (came,)
        pieces: list[list[Tensor]] = [[] for _ in like]
        for part, group in zip(parts, sources, strict=True):
            start = 0
            for n in group:
                for column, into in zip(like, pieces, strict=True):
                    size = n * _row_bytes(column)
                    into.append(part[start : start + size].view(column.dtype).view(n, *column.shape[1:]))
                    start += size
        return [torch.cat(rows) for rows in pieces]


def moves(ledger: Ledger, rows: Sequence[int], group: int, units: int, of: int = 1) -> None:
    """Writes down what the ranks of a group along sites move, at the most, where each group wants such rows, in bytes.

    There are so many units of so many rows, dealt out in the order of lanes.
    """
    shape = ledger.shape
    sites, n = shape.sites, shape.sites * shape.data * shape.latents
    parts = torch.tensor([len(Share(number, n).of(units)) * of for number in range(n)])
    every = parts.view(shape.data, shape.latents, sites)
    others = every.sum(2) - every[..., group]
    ledger.exchanged("sites", int(parts.max()) * sum(rows), int(others.max()) * rows[group])
    ledger.gathered("latents", -(-int(every.sum(2).max()) * rows[group] // WORD) * WORD)


def _row_bytes(column: Tensor) -> int:
    return column.element_size() * math.prod(column.shape[1:])


def _bytes(column: Tensor) -> Tensor:
    """Returns a tensor's bytes, one after the other."""
    return column.contiguous().view(-1).view(torch.uint8)
