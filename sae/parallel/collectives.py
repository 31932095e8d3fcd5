"""The few collectives needed: sums over ranks, what others have, rows for others, and a flag that any may set.

Each goes over some ranks, along an axis of the mesh (`mesh.py`), or over all where none is named. A rank alone is not
asked for anything.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sae.parallel.ranks import Axis, collective, everyone

BUCKET_BYTES = 32 * 2**20
"""Of tensors that are summed at once. More gain nothing on any wire, and would be a second copy of a large coder."""


def total(value: Tensor, over: Axis | None = None) -> Tensor:
    """Returns the sum of `value` over ranks."""
    return _reduced(value, dist.ReduceOp.SUM, over)


def smallest(value: Tensor, over: Axis | None = None) -> Tensor:
    """Returns the smallest of any rank, member by member."""
    return _reduced(value, dist.ReduceOp.MIN, over)


def largest(value: Tensor, over: Axis | None = None) -> Tensor:
    """Returns the largest of any rank, member by member."""
    return _reduced(value, dist.ReduceOp.MAX, over)


def _reduced(value: Tensor, how: dist.ReduceOp.RedOpType, over: Axis | None) -> Tensor:
    over = over or everyone()
    if over.moves:
        value = value.clone()
        with collective():
            dist.all_reduce(value, how, over.group)
    return value


def total_(*tensors: Tensor, over: Axis | None = None) -> None:
    """Replaces each tensor by its sum over ranks.

    Small ones of a data type travel together; one larger than a bucket is summed where it lies. So beside them a bucket
    is held and no more, whatever their size.
    """
    over = over or everyone()
    if not over.moves:
        return
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            with collective():
                dist.all_reduce(bucket[0], group=over.group)
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        with collective():
            dist.all_reduce(flat, group=over.group)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields all tensors, as many at a time as are of a bucket's size together, and of one data type."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket, size = [], 0
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype):
            if tensor.nbytes >= BUCKET_BYTES:
                yield [tensor]
                continue
            if size + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        if bucket:
            yield bucket


def bytes_of_sums(*tensors: Tensor) -> list[int]:
    """Returns what a rank hands to each collective of `total_(*tensors)`, which may be meta tensors."""
    return [sum(tensor.nbytes for tensor in bucket) for bucket in _buckets(tensors)]


def stacked(value: Tensor, over: Axis | None = None) -> Tensor:
    """Returns what all ranks have, of one shape, as [ranks, *shape]."""
    over = over or everyone()
    if not over.moves:
        return value[None]
    found = value.new_empty(over.world_size, *value.shape)
    with collective():
        dist.all_gather(list(found), value.contiguous(), over.group)
    return found


def exchanged(rows: Tensor, sent: list[int], received: list[int], over: Axis) -> Tensor:
    """Returns the rows that all ranks have for this one, in their order.

    Of its own, the first `sent[0]` rows are for the first rank and so on; `received` says how many each has for it.
    """
    if not over.moves:
        return rows
    found = rows.new_empty(sum(received), *rows.shape[1:])
    with collective():
        dist.all_to_all_single(found, rows.contiguous(), received, sent, group=over.group)
    return found


def of_every_rank(numbers: Tensor, over: Axis | None = None) -> list[list[int]]:
    """Returns the whole numbers [k] of all ranks, in their order: the one thing that the host must wait for."""
    return stacked(numbers, over).tolist()


def gathered(*columns: Tensor, over: Axis | None = None) -> tuple[Tensor, ...]:
    """Returns columns of equal length, the rows of all ranks one after the other; ranks may have different numbers.

    All columns move at once, after the numbers of rows; whole numbers, which must be below 2^31, as half of their size.
    """
    over = over or everyone()
    if not over.moves:
        return columns
    words = _words(columns)
    rows = torch.cat(words, 1)
    counts = [count for (count,) in of_every_rank(torch.tensor([len(rows)], device=rows.device), over)]
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    parts = stacked(padded, over)
    found = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    split = found.split([part.shape[1] for part in words], dim=1)
    return tuple(
        part[:, 0].long() if column.dtype == torch.int64 else part.contiguous().view(column.dtype)[:, 0]
        for part, column in zip(split, columns, strict=True)
    )


def _words(columns: Sequence[Tensor]) -> list[Tensor]:
    """Returns columns of n members as [n, w] of 32 bits."""
    return [(c.int() if c.dtype == torch.int64 else c)[:, None].view(torch.int32) for c in columns]


def bytes_of_rows(*columns: Tensor) -> list[int]:
    """Returns what a rank hands to each collective of `gathered(*columns)`, where none has more rows; for meta tensors.

    They are gathered: a rank receives as much of every other one.
    """
    return [8, sum(word.nbytes for word in _words(columns))]


def collected(rows: Tensor) -> Tensor:
    """Returns on rank 0 the rows of all ranks one after the other, on the others none: they may be many."""
    if not everyone().moves:
        return rows
    counts = [count for (count,) in of_every_rank(torch.tensor([len(rows)], device=rows.device))]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = list(rows.new_empty(len(counts), *padded.shape)) if everyone().rank == 0 else None
    with collective():
        dist.gather(padded, parts)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]) if parts else rows[:0]


def any_rank(flag: bool) -> bool:
    """Returns whether the flag is set on any rank, so that all ranks stop at the same step."""
    return any_rank_each(flag)[0]


def any_rank_each(*flags: bool) -> list[bool]:
    """Returns the same of several flags, that travel together."""
    return [bool(flag) for flag in largest(torch.tensor([float(flag) for flag in flags])).tolist()]
