"""Some latents of a coder, without the others: what is not asked for is not read, which tells with a mapped file.

    each latent by itself    h = y W_enc[ids]^T + b_enc[ids], and the rule on these alone
    the k best of a group    those of groups in which there are such latents; in the end those are left that were asked
                             for. A group is all latents, or some neighbors
    anything else            the full codes: matching pursuit, choice by gradients, rules that do not say how to

Products are taken in float32 at least, from inputs that are not rounded to the coder's precision: a mapped bfloat16
coder gives the values of the one that was loaded in float32. The last line is the exception: there the coder's own
precision holds.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder import tiles
from sae.coder.tensors import CoderTensors, checked_ids
from sae.kernels.codes import SparseLatents, offsets_of


@torch.no_grad()
def encode(
    coder: CoderTensors,
    x: Float[Tensor, "n d_in"],
    latents: Sequence[int] | Int[Tensor, "m"],
    whole: bool,
    full: Callable[[], SparseLatents],
) -> SparseLatents:
    """Returns those entries of a coder's codes that are of some latents; `SparseCoder.encode` with `latents`.

    `full` computes all codes; with `whole`, nothing else will do, whatever the rule. ConfigError names an id that is
    out of range or given twice.
    """
    spec = coder.spec
    ids = checked_ids(latents, spec.d_sae, x.device).sort().values
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise ConfigError(f"latents: {int(twice[0])} is given twice; each may be asked for once")
    if whole or not tiles.can_be(coder, False):
        codes = full()
        kept = torch.isin(codes.ids, ids)
        offsets = offsets_of(torch.bincount(codes.tokens[kept], minlength=len(x)))
        return SparseLatents(offsets, codes.ids[kept], codes.values[kept], spec.d_sae, (len(x),))
    seen = tiles.Seen(coder.centered(x)[0].chunk(spec.n_blocks, dim=1))
    if tiles.alone(coder):
        offsets, found, h = tiles.by_themselves(coder, seen, tiles.spans_of(coder, ids))
    else:
        offsets, found, h = _winners(coder, seen, ids)
    own = {name: tensor.to(x.dtype) for name, tensor in coder.per_latent().items()}
    return SparseLatents(offsets, found, spec.selection.activate(h, found, own), spec.d_sae, (len(x),))


def _winners(coder: CoderTensors, seen: tiles.Seen, ids: Int[Tensor, "m"]) -> tiles.Chosen:
    """Returns the entries of latents that win over the others of their group of neighbors."""
    best = tiles.best_of(coder)
    assert best is not None
    parts = []
    for first in (torch.unique(ids // best[0]) * best[0]).tolist():
        found = tiles.k_best(coder, seen, best, slice(first, first + best[0]))
        wanted = torch.isin(found.ids, ids)
        parts.append((offsets_of(wanted.sum(1)), found.ids[wanted], found.h[wanted]))
    return tiles.side_by_side(seen, parts)
