"""The largest of entries that lie in several parts, exactly, found by sums over the parts and nothing else.

Numbers are read as whole ones in the same order, and the one at the cut is found by its digits of 16 bits, the highest
first: how often each digit occurs in all parts together says which one it has. So a part tells the others a histogram
for every digit, however many entries there are and however many are kept. Where the cut falls among equals, the entries
kept of them, those that lie first, are found in the same way by where they lie.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.kernels.codes import Entries

BITS = 16
DIGITS = 1 << BITS
PLACE_DIGITS = 3  # of token x m + latent, which is so below 2^48
WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Sum = Callable[[Tensor], Tensor]
"""Returns the sum of what all parts have; they must all ask, in the same order."""


class Kept(NamedTuple):
    """What a part keeps."""

    mask: Bool[Tensor, "n"]
    own: int
    """How many these are."""
    least: Float[Tensor, ""]
    """The smallest that any part keeps."""


def largest_of_parts(entries: Entries, m: int, count: int, total: Sum) -> Kept:
    """Returns which entries of this part are among the `count` largest, at least one, of all parts.

    Tokens are those of all parts together, and ids below m: of equal entries those of the lowest token x m + id are
    kept, and NaN is largest, as `top_of` says. The host waits once, to hear whether the cut falls among equals.
    """
    rising = _whole_numbers(entries.values)
    number, left, equal = cut_of_parts(rising, entries.values.element_size() * 8 // BITS, count, total)
    mask = rising >= number
    tied, own = torch.stack([(left < equal).long(), mask.sum()]).tolist()
    if tied:
        falling = (1 << (PLACE_DIGITS * BITS - 1)) - 1 - (entries.tokens * m + entries.ids)
        cut = rising == number
        last, _, _ = cut_of_parts(falling, PLACE_DIGITS, left, total, cut)
        mask = mask & (~cut | (falling >= last))
        own = int(mask.sum())
    return Kept(mask, own, _as_value(number, entries.values.dtype))


def histograms(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what parts sum, of values of a type, and beside it where the cut falls among equals; as meta tensors."""
    one = torch.empty(DIGITS, dtype=torch.int64, device="meta")
    return [one] * (dtype.itemsize * 8 // BITS), [one] * PLACE_DIGITS


def cut_of_parts(
    numbers: Int[Tensor, "n"],
    digits: int,
    count: int | Int[Tensor, ""],
    total: Sum,
    among: Bool[Tensor, "n"] | None = None,
) -> tuple[Int[Tensor, ""], Int[Tensor, ""], Int[Tensor, ""]]:
    """Returns (what the `count` largest of all parts reach, how many equal it of those, and in all).

    Numbers have so many digits, sign included; only those in `among` count. If there are fewer than `count`, all reach
    it. Every digit is one sum.
    """
    first = digits - 1
    left = count if isinstance(count, Tensor) else torch.full((), count, device=numbers.device)
    found = equal = torch.zeros((), dtype=torch.long, device=numbers.device)
    for place in reversed(range(digits)):
        digit = (numbers >> BITS * place) + (DIGITS // 2 if place == first else 0)  # the sign is part of the first one
        mine = among if place == first else numbers >> BITS * (place + 1) == found
        mine = mine & among if among is not None and mine is not None else mine
        counts = total(_histogram(digit & (DIGITS - 1), mine))
        reach = counts.flip(0).cumsum(0).flip(0)  # so many are at least as large
        left = torch.minimum(left, reach[0])
        at = (reach >= left).sum(0, keepdim=True) - 1
        equal = counts.gather(0, at)[0]
        left = left - (reach.gather(0, at)[0] - equal)
        found = at[0] - DIGITS // 2 if place == first else (found << BITS) + at[0]
    return found, left, equal


def _histogram(digit: Int[Tensor, "n"], mine: Bool[Tensor, "n"] | None) -> Int[Tensor, "digits"]:
    """Returns how often each digit occurs; no device is waited for, and where there is none, little is counted."""
    if mine is not None and digit.device.type == "cpu":
        digit, mine = digit[mine], None
    if digit.device.type == "cpu":
        return torch.bincount(digit, minlength=DIGITS)
    ones = torch.ones_like(digit) if mine is None else mine.long()
    return torch.zeros(DIGITS, dtype=torch.long, device=digit.device).scatter_add_(0, digit, ones)


def _whole_numbers(values: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Returns whole numbers in the order of the values: equal where these are, NaN the largest of all."""
    kind = WHOLE[values.element_size()]
    most = torch.iinfo(kind).max
    bits = (values + 0.0).view(kind)  # -0 is 0
    return torch.where(values.isnan(), most, _turned(bits, most)).long()


def _as_value(number: Int[Tensor, ""], dtype: torch.dtype) -> Float[Tensor, ""]:
    """Returns the value of such a number."""
    kind = WHOLE[dtype.itemsize]
    return _turned(number.to(kind), torch.iinfo(kind).max).view(dtype)


def _turned(bits: Tensor, most: int) -> Tensor:
    """Returns the bits of floats as numbers in their order: of negative ones all but the sign are turned; and back."""
    return bits ^ ((bits >> 8 * bits.element_size() - 1) & most)
