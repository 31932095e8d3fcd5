"""Which latents stay, found by tiles of tokens and latents: neither all scores nor W_enc are ever whole in memory.

    each latent by itself    the rule looks at every tile alone
    the k best of a group    what the rule keeps of a tile are candidates; of those of a group, which may lie in many
                             tiles, it keeps what it would keep of all: of equal ones the first. A group is all latents,
                             or some neighbors
    anything else            cannot be: matching pursuit, rules that do not say how they choose

A tile is as many latents as are read at once, times so many tokens that their product is bound by arithmetic. Every row
of W_enc is read once for all tokens given. Latents lie in pieces (`CoderTensors.pieces`), each on a device.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.coder.tensors import CoderTensors, Piece
from sae.kernels.codes import flat
from sae.kernels.rows import joined, offsets_of
from sae.selection import Budget, Moment

FEW = 256  # tokens below which a product with all latents waits for the weights, not for its sums
TOKENS = 4096  # for which every row of W_enc is read once, and their inputs may have
INPUTS = 2**24  # entries
LATENTS = 2**13  # of a tile, at the most
HELD = 2**24  # entries of W_enc that are read at once, at the most: 64 MiB in float32
SCORES = {"cpu": 2**21}  # of a tile, at the most: 8 MiB
SCORES_ELSEWHERE = 2**26
MERGED = 8  # times as many candidates as are kept are there before some are dropped

Best = tuple[int, Budget]
Chosen = tuple[Tensor, Tensor, Tensor]
"""Row offsets [n + 1], latent ids [nnz], ascending within a row, and their pre-activations [nnz]."""


class Seen(NamedTuple):
    """n tokens as the latents see them."""

    inputs: tuple[Float[Tensor, "n width"], ...]
    """Of each block."""
    gradients: Float[Tensor, "n d_out"] | None = None
    """Of the loss at the sites written, in the normalized space, if selection looks at them."""


class Span(NamedTuple):
    """Some latents of a piece, which are read at once."""

    piece: Piece
    some: slice | Int[Tensor, "m"]
    """Of its rows."""
    ids: Int[Tensor, "m"]
    """Ascending."""
    first: int = 0
    """The first of them, of neighbors."""


class Candidates(NamedTuple):
    """Of every token equally many latents, in the order of their ids."""

    ids: Int[Tensor, "n c"]
    h: Float[Tensor, "n c"]
    compared: Float[Tensor, "n c"]


@dataclass(frozen=True)
class Tile:
    """The encoders of some latents, read."""

    coder: CoderTensors
    span: Span
    encoders: dict[str, Tensor]
    norms: Float[Tensor, "m"] | None
    """Of their decoders, where selection compares with them."""
    decoders: Float[Tensor, "m width"] | None
    """Where selection looks at what a latent does to the loss."""

    def scores(self, of: Seen) -> Iterator[tuple[Float[Tensor, "t m"], Float[Tensor, "t m"]]]:
        """Yields, of some tokens after the other, the pre-activations and what selection compares, until the next."""
        piece, spec = self.span.piece, self.coder.spec
        most = SCORES.get(piece.device.type, SCORES_ELSEWHERE)
        size = max(1, most // max(1, len(self.span.ids)))
        seen = of.inputs[piece.block]
        room = seen.new_empty(min(size, len(seen)), len(self.span.ids), device=piece.device)
        for start in range(0, max(1, len(seen)), size):
            some = slice(start, start + size)
            y = seen[some].to(piece.device)
            h = spec.encoding.preactivations(y, self.encoders, out=room[: len(y)])
            compared = h if self.norms is None else h * self.norms
            if of.gradients is not None and self.decoders is not None:
                effects = (of.gradients[some, piece.columns].to(piece.device) @ self.decoders.T).abs()
                mean = torch.tensor(spec.calibration[self.group] if spec.calibration else 0.0)
                compared = spec.rule.augment(compared, effects, Moment(1.0, len(h), {"calibration": mean}))
            yield h, compared

    @property
    def group(self) -> int:
        """Returns the number of the latents among which selection chooses."""
        return 0 if self.coder.spec.budget == "shared" else self.span.piece.block


def tokens(coder: CoderTensors) -> int:
    """Returns how many tokens are to be given at once."""
    return min(TOKENS, max(FEW, INPUTS // coder.spec.d_in))


def can_be(coder: CoderTensors, gradients: bool) -> bool:
    """Returns whether a coder's latents can be chosen by tiles; `gradients`, if selection is given them."""
    spec = coder.spec
    if spec.encoding.pursues or (gradients and not spec.rule.augments_alone):
        return False
    return alone(coder) or best_of(coder) is not None


def alone(coder: CoderTensors) -> bool:
    """Returns whether every latent fires by itself."""
    return coder.spec.rule.competes(bool(coder.spec.calibration)) == "nothing"


def best_of(coder: CoderTensors) -> Best | None:
    """Returns (size, rule) if the k best of each `size` neighbors fire, as the rule chooses them."""
    return coder.spec.rule.best_of(coder.rule_groups()[0].stop)


def choose(coder: CoderTensors, of: Seen) -> Chosen:
    """Returns what a rule keeps of all latents, if it `can_be` found."""
    best = None if alone(coder) else best_of(coder)
    if best is None:
        return by_themselves(coder, of, spans(coder))
    found = k_best(coder, of, best, slice(0, coder.spec.d_sae))
    n, k = found.ids.shape
    return torch.arange(n + 1, device=found.ids.device) * k, found.ids.reshape(-1), found.h.reshape(-1)


def spans(coder: CoderTensors, within: slice | None = None, size: int = 1) -> Iterator[Span]:
    """Yields all latents, or those within a range, in order: of groups of `size` whole ones, or parts of one."""
    within = within or slice(0, coder.spec.d_sae)
    for piece in coder.pieces():
        most = max(1, min(LATENTS, HELD // piece.width))
        first, last = max(piece.latents.start, within.start), min(piece.latents.stop, within.stop)
        while first < last:
            group = first // size * size
            end = min(last, group + most // size * size if size <= most else min(group + size, first + most))
            own = slice(first - piece.latents.start, end - piece.latents.start)
            yield Span(piece, own, torch.arange(first, end, device=piece.device), first)
            first = end


def spans_of(coder: CoderTensors, ids: Int[Tensor, "m"]) -> Iterator[Span]:
    """Yields some latents, given in order."""
    for piece in coder.pieces():
        mine = ids[(ids >= piece.latents.start) & (ids < piece.latents.stop)].to(piece.device)
        for own in mine.split(max(1, min(LATENTS, HELD // piece.width))) if len(mine) else ():
            yield Span(piece, own - piece.latents.start, own)


def read(coder: CoderTensors, span: Span, of: Seen) -> Tile:
    """Returns the encoders of some latents, in the precision of the inputs, on the device of their piece."""
    piece, dtype = span.piece, of.inputs[0].dtype
    encoders = {name: tensor[span.some].to(piece.device, dtype) for name, tensor in piece.encoders.items()}
    norms = decoders = None
    if coder.spec.select_by_decoder_norm or of.gradients is not None:
        decoders = piece.decoder[span.some].to(piece.device, dtype)
        norms = decoders.norm(dim=1) if coder.spec.select_by_decoder_norm else None
    return Tile(coder, span, encoders, norms, decoders)


def by_themselves(coder: CoderTensors, of: Seen, some: Iterable[Span]) -> Chosen:
    """Returns what a rule keeps of some latents that fire by themselves."""
    device, parts = of.inputs[0].device, []
    for span in some:
        tile = read(coder, span, of)
        given = coder.given(tile.group, span.ids.to(device))
        own, found = {name: tensor.to(span.piece.device) for name, tensor in given.items()}, []
        for h, compared in tile.scores(of):
            offsets, local = coder.spec.rule.infer(compared, own)
            kept = h.reshape(-1).index_select(0, flat(offsets, local, len(span.ids)))
            found.append((offsets.diff(), span.ids[local], kept))
        counts, ids, kept = (torch.cat(members).to(device) for members in zip(*found, strict=True))
        parts.append((offsets_of(counts), ids, kept))
    return side_by_side(of, parts)


def side_by_side(of: Seen, parts: list[Chosen]) -> Chosen:
    """Returns what was chosen of some latents after the other; of none, nothing."""
    none = torch.zeros(len(of.inputs[0]) + 1, dtype=torch.long, device=of.inputs[0].device)
    return joined([*parts, (none, none[:0], of.inputs[0].new_zeros(0))])


def k_best(coder: CoderTensors, of: Seen, best: Best, within: slice) -> Candidates:
    """Returns what a rule for the k best keeps of groups of latents, which a range holds whole."""
    (size, rule), found = best, []
    for _, some in groupby(spans(coder, within, size), lambda span: span.first // size):
        parts: list[Candidates] = []
        for span in some:  # one alone may hold several groups
            parts.append(_of_tile(read(coder, span, of), of, best))
            if len(parts) > 1 and sum(part.ids.shape[1] for part in parts) > MERGED * rule.k:
                parts = [_best(parts, rule)]
        found.append(parts[0] if len(parts) == 1 else _best(parts, rule))
    return _cat(found, 1)


def _of_tile(tile: Tile, of: Seen, best: Best) -> Candidates:
    """Returns the k best of every group in a tile, or of the part of one that it holds."""
    (size, rule), m, found = best, len(tile.span.ids), []
    width = min(size, m)
    starts = torch.arange(0, m, width, device=tile.span.ids.device)
    for h, compared in tile.scores(of):
        columns = torch.arange(m, device=h.device).expand(len(h), m)
        if width > rule.k:
            ids = rule.infer(compared.view(-1, width), {})[1].view(-1, len(starts), rule.k)
            columns = (ids + starts[:, None]).flatten(1)
        found.append(Candidates(tile.span.ids[columns], h.gather(1, columns), compared.gather(1, columns)))
    return Candidates(*(part.to(of.inputs[0].device) for part in _cat(found, 0)))


def _best(parts: list[Candidates], rule: Budget) -> Candidates:
    """Returns those of a group's candidates that the rule keeps."""
    all_of = _cat(parts, 1)
    n, c = all_of.ids.shape
    if c <= rule.k:
        return all_of
    columns = rule.infer(all_of.compared, {})[1].view(n, rule.k)
    return Candidates(*(part.gather(1, columns) for part in all_of))


def _cat(parts: list[Candidates], dim: int) -> Candidates:
    return parts[0] if len(parts) == 1 else Candidates(*(torch.cat(same, dim) for same in zip(*parts, strict=True)))
