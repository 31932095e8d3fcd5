"""A coder cut over ranks: the part that this rank holds, empty or of a coder that is whole."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

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


def retold(coder: SparseCoder, **changes: Any) -> None:
    """Replaces fields of the spec of a coder, or of that of which this is a part."""
    if coder.shard:
        coder.shard = replace(coder.shard, whole=coder.whole.with_(**changes))
        coder.spec = coder.shard.spec
    else:
        coder.spec = coder.spec.with_(**changes)


@torch.no_grad()
def tensors_of(coder: SparseCoder, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns, of the tensors of a whole coder, those of a part: views, where it holds neighbors."""
    own = {}
    for name in coder.state_dict():
        rows = coder.shard.rows(name) if coder.shard else None
        pieces = [whole[name][piece.start : piece.stop] for piece in rows.pieces] if rows else [whole[name]]
        own[name] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    return own


@torch.no_grad()
def part_of(coder: SparseCoder, axis: Axis) -> SparseCoder:
    """Returns this rank's part of a coder that every rank has."""
    if not axis.moves:
        return coder
    found = empty_part(coder.spec, axis, "meta")
    own = tensors_of(found, coder.state_dict())
    found.load_state_dict({name: tensor.clone() for name, tensor in own.items()}, assign=True)
    return found.requires_grad_(coder.W_dec.requires_grad)
