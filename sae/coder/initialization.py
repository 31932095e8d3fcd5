"""How the tensors of a coder start before training."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.seeding import generator
from sae.coder.tensors import CoderTensors
from sae.encoders import affine

BLOCK = 2**14
"""Rows that are drawn together, by a generator of their own: who needs some of them draws no others."""


class Drawn(NamedTuple):
    """Neighboring rows of W_enc that are computed with together: of one layer of the coder, and of one block."""

    rows: Float[Tensor, "m width"]
    """Unit vectors, those that are another rank's included, so that all ranks round alike."""
    held: slice
    """Which of them this rank holds."""
    own: slice
    """Their numbers among the latents that this rank holds."""
    layer: int


def initialize(
    coder: CoderTensors,
    center: Float[Tensor, "d_out"],
    seed: int,
    *key: str | int,
    input_center: Float[Tensor, "d_in"] | None = None,
    spread: float = 1.0,
) -> None:
    """Starts a coder, or a shard of one, as TopK scaling does (Gao 2024, arXiv 2406.04093, appendix A).

    Rows of W_enc are random unit vectors, b_enc is zero and b_dec is `center`, the mean or geometric median of the
    normalized training activations. An autoencoder's W_dec is a copy of W_enc (the tied start keeps latents alive). A
    transcoder's W_dec is zero, so that it starts by predicting the mean output; its encoder is centered on
    `input_center`, by b_pre or, without one, by b_enc (Paulo 2025, arXiv 2501.18823). `spread`, the standard deviation
    of an input's component, is that of the pre-activations, from which trained thresholds start.
    """
    spec = coder.spec
    tied = spec.is_autoencoder and not spec.cross_layer
    before = None if tied else input_center
    with torch.no_grad():
        coder.b_dec.copy_(center)
        if before is not None and spec.pre_bias == "own":
            coder.b_pre.copy_(before)
        for rows, held, own, layer in _drawn(coder, seed, *key):
            coder.W_enc[own] = rows[held].to(coder.W_enc)
            if tied:
                coder.W_dec[own] = rows[held].to(coder.W_dec)
            elif before is not None and spec.pre_bias == "none":
                weight = rows.to(coder.W_enc)
                x = before.to(weight).chunk(spec.n_blocks)[layer]
                coder.b_enc[own] = -affine(x[None], weight, weight.new_zeros(len(weight)))[0, held]
        for name, start in spec.selection.parameters(spec.d_sae, spread).items():
            getattr(coder, name).copy_(start)


def _drawn(coder: CoderTensors, seed: int, *key: str | int) -> Iterator[Drawn]:
    """Yields the rows of W_enc that this rank holds, with all that are drawn and computed with together."""
    whole, width, layers = coder.whole.d_sae, coder.W_enc.shape[1], coder.whole.n_blocks
    held = coder.shard.rows("W_enc") if coder.shard else None
    size, start, block, found = whole // layers, 0, -1, torch.empty(0)
    for piece in held.pieces if held else [range(whole)]:
        first = piece.start
        while first < piece.stop:
            if block != first // BLOCK:
                block = first // BLOCK
                found = _block(block, min(BLOCK, whole - block * BLOCK), width, seed, *key)
            layer = first // size
            begin = max(layer * size, block * BLOCK)
            end = min((layer + 1) * size, (block + 1) * BLOCK, whole)
            stop = min(end, piece.stop)
            together = found[begin - block * BLOCK : end - block * BLOCK]
            yield Drawn(together, slice(first - begin, stop - begin), slice(start, start + stop - first), layer)
            start, first = start + stop - first, stop


def _block(number: int, rows: int, width: int, seed: int, *key: str | int) -> Float[Tensor, "rows width"]:
    """Returns random unit vectors. The first block has the key of all, by which coders always began."""
    own = (number,) if number else ()
    found = torch.randn((rows, width), generator=generator(seed, "init", *key, *own))
    return found / found.norm(dim=1, keepdim=True)
