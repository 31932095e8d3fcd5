"""The latents of a coder that one of several ranks holds, as a coder of these alone.

    sum over ranks of codes times decoder = what the whole coder makes of the codes

Tensors with a row for each latent are cut (`sae/parallel/cut.py`); biases of inputs and outputs and the skip path every
rank has whole. So everything that is linear in the latents is what it is in the whole coder, and what ranks must move
is the sum, and whatever chooses among all latents.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.spec import CoderSpec
from sae.encoders import Encoder
from sae.kernels import top_ids
from sae.kernels.largest import kept_of_parts
from sae.parallel import collectives
from sae.parallel.cut import Cut
from sae.parallel.ledger import Ledger
from sae.parallel.ranks import Axis
from sae.selection import Selection

SHARED = ("b_dec", "b_pre", "W_skip")  # of which every rank has the whole


class HeldRows(NamedTuple):
    """Some rows of a tensor, which lie one after the other in this rank's."""

    pieces: list[range]
    """Their numbers in the whole."""
    total: int
    """Rows of the whole."""

    def told(self) -> str:
        """Returns which they are: "[0:48, 96:144]"."""
        return f"[{', '.join(f'{piece.start}:{piece.stop}' for piece in self.pieces)}]"


@dataclass(frozen=True)
class Shard:
    """Which latents of a coder a rank holds."""

    whole: CoderSpec
    axis: Axis

    def __post_init__(self) -> None:
        check_choice(self.whole.selection, self.whole.encoding, self._size)

    @property
    def _size(self) -> int:
        return self.whole.d_sae // self.whole.n_blocks

    @cached_property
    def cut(self) -> Cut:
        """Returns how the latents are cut."""
        unit = self.whole.selection.unit(self._size) or 1
        return Cut(self._size, self.whole.n_blocks, self.axis, unit)

    @cached_property
    def groups(self) -> list[Cut]:
        """Returns how those are cut among which the rule chooses: of each block, or of all together."""
        if self.whole.budget == "shared" or self.whole.n_blocks == 1:
            return [self.cut]
        return [replace(self.cut, blocks=1)] * self.whole.n_blocks

    @cached_property
    def spec(self) -> CoderSpec:
        """Returns the spec of a coder of the latents that this rank holds."""
        own = self.whole.selection.within(len(self.cut.part()), self._size)
        return self.whole.unchecked(d_sae=self.cut.held, selection=own)

    def rows(self, name: str) -> "HeldRows | None":
        """Returns which rows this rank has of a parameter, a buffer, or what is like one; None: all."""
        if name in SHARED:
            return None
        found, start = [], 0
        for block, piece in enumerate(self.cut.pieces()):
            times = self.whole.n_blocks - block if name == "W_dec" else 1
            first = start + (piece.start - block * self._size) * times
            found.append(range(first, first + len(piece) * times))
            start += self._size * times
        return HeldRows(found, start)


def check_choice(rule: Selection, encoding: Encoder, size: int) -> None:
    """Raises ConfigError if it is not known how to choose among latents, in blocks of a size, of several ranks."""
    if encoding.pursues or rule.unit(size) is None:
        pursues = f"encoder {Encoder.get_choice_name(type(encoding))}"
        what = pursues if encoding.pursues else f"selection {Selection.get_choice_name(type(rule))}"
        raise ConfigError(f"parallel.latents: {what} cannot choose over several ranks; set it to 1")


class _Summed(torch.autograd.Function):
    """Sums over ranks; the gradient of the sum is that of each part, and every rank has it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, axis: Axis) -> Tensor:
        ctx.mark_dirty(part)
        collectives.total_(part, over=axis)
        return part

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def summed(part: Float[Tensor, "n d_out"], axis: Axis) -> Float[Tensor, "n d_out"]:
    """Returns the sum over ranks of what their latents make of the output, differentiable."""
    return _Summed.apply(part, axis)


def moves_output(ledger: Ledger, width: int, dtype: torch.dtype, times: int = 1, perhaps: bool = False) -> None:
    """Writes down that what latents make of every token's output is summed, or so many parts of it at once."""
    size = times * ledger.tokens * width * dtype.itemsize
    ledger.summed("latents", size, times=ledger.passes, perhaps=perhaps)


class Best(NamedTuple):
    """Entries of some tokens, among which are those that this rank holds of the k best."""

    ids: Int[Tensor, "n c"]
    """Ascending in a row."""
    known: Float[Tensor, "n c"]
    """Their pre-activations."""
    kept: Bool[Tensor, "n c"]
    """Which are of the best."""


def best(
    scores: Float[Tensor, "n m"], compared: Float[Tensor, "n m"], k: int, groups: list[slice], cuts: list[Cut]
) -> Best:
    """Returns the k best of each group, of which this rank has these scores; of all ranks' together.

    Of equal ones those of lower ids are kept. Ranks tell each other values alone: what one holds of a block has lower
    ids than what the next one holds.
    """
    found = [best_of(compared[:, group], k, cut, cut.most) for group, cut in zip(groups, cuts, strict=True)]
    ids = torch.cat([columns + group.start for (columns, _), group in zip(found, groups, strict=True)], dim=1)
    return Best(ids, scores.gather(1, ids), torch.cat([kept for _, kept in found], dim=1))


def moves_lists(
    ledger: Ledger, cut: Cut, k: int, dtype: torch.dtype, perhaps: bool = False, least: int | None = None
) -> None:
    """Writes down that `best_of` is asked for the k best of every token, of at least `least`, tile by tile."""
    most, few = (cut.blocks * ledger.tokens * min(n, cut.most) * dtype.itemsize for n in (k, least or k))
    ledger.gathered("latents", most, ledger.tiles, perhaps, few)


def best_of(
    compared: Float[Tensor, "n m"], k: int, cut: Cut, most: int
) -> tuple[Int[Tensor, "n c"], Bool[Tensor, "n c"]]:
    """Returns columns, ascending in a row, and which of them are of the k best.

    The columns fall into as many blocks as the latents that are cut; `most` are those of a block of any rank.
    """
    if not cut.axis.moves:
        ids = top_ids(compared, min(k, compared.shape[1]))
        return ids, torch.ones_like(ids, dtype=torch.bool)
    n, size, c = len(compared), compared.shape[1] // cut.blocks, min(k, most)
    own = min(k, size)
    lists = compared.new_full((cut.blocks, n, c), -torch.inf)
    columns, orders = [], []
    for block, part in enumerate(compared.split(size, dim=1) if size else ()):
        ids = top_ids(part, own)
        values, order = part.gather(1, ids).sort(dim=1, descending=True, stable=True)
        lists[block, :, :own] = values
        columns.append(ids + block * size)
        orders.append(order)
    every = collectives.stacked(lists, cut.axis).transpose(0, 1)  # in the order of ids: blocks, in each the ranks
    counts = kept_of_parts(every.reshape(-1, n, c), k).unflatten(0, (cut.blocks, -1))[:, cut.axis.rank]
    if not size:
        return counts.new_zeros(n, 0), counts.new_zeros(n, 0, dtype=torch.bool)
    places = torch.arange(own, device=compared.device)
    kept = [
        torch.empty_like(order, dtype=torch.bool).scatter_(1, order, places < count[:, None])
        for order, count in zip(orders, counts, strict=True)
    ]
    return torch.cat(columns, dim=1), torch.cat(kept, dim=1)
