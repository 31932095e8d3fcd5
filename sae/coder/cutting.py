"""A coder cut over ranks: the part that this rank holds, empty or of a coder that is whole."""

import torch

from sae.coder.coder import SparseCoder
from sae.coder.shard import Shard
from sae.coder.spec import CoderSpec
from sae.parallel.ranks import Axis


def empty_part(
    spec: CoderSpec, axis: Axis, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SparseCoder:
    """Returns this rank's part of a coder, with tensors as they are before anything is drawn; alone, all of it."""
    if not axis.moves:
        return SparseCoder(spec, device, dtype)
    shard = Shard(spec, axis)
    coder = SparseCoder(shard.spec, device, dtype)
    coder.shard = shard
    return coder


@torch.no_grad()
def part_of(coder: SparseCoder, axis: Axis) -> SparseCoder:
    """Returns this rank's part of a coder that every rank has."""
    if not axis.moves:
        return coder
    found, whole = empty_part(coder.spec, axis, "meta"), coder.state_dict()
    own = {}
    for name in found.state_dict():
        rows = found.shard.rows(name) if found.shard else None
        pieces = [whole[name][piece.start : piece.stop] for piece in rows.pieces] if rows else [whole[name]]
        own[name] = torch.cat(pieces)
    found.load_state_dict(own, assign=True)
    return found.requires_grad_(coder.W_dec.requires_grad)
