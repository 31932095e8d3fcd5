"""The few collectives needed: sums over ranks, what all ranks have, and a flag that any of them may set."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sae.parallel.ranks import collective, rank, world_size

BUCKET_BYTES = 32 * 2**20
"""Of tensors that are summed at once. More gain nothing on any wire, and would be a second copy of a large coder."""


def total(value: Tensor) -> Tensor:
    """Returns the sum of `value` over ranks."""
    if dist.is_initialized():
        value = value.clone()
        with collective():
            dist.all_reduce(value)
    return value


def total_(*tensors: Tensor) -> None:
    """Replaces each tensor by its sum over ranks.

    Small ones of a data type travel together; one larger than a bucket is summed where it lies. So beside them a bucket
    is held and no more, whatever their size.
    """
    if not dist.is_initialized():
        return
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            with collective():
                dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        with collective():
            dist.all_reduce(flat)
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


def smallest(value: Tensor) -> Tensor:
    """Returns the smallest of any rank, member by member."""
    if dist.is_initialized():
        value = value.clone()
        with collective():
            dist.all_reduce(value, dist.ReduceOp.MIN)
    return value


def of_every_rank(numbers: Tensor) -> list[list[int]]:
    """Returns the whole numbers [k] of all ranks, in their order: the one thing that the host must wait for."""
    if not dist.is_initialized():
        return [numbers.tolist()]
    found = numbers.new_empty(world_size(), len(numbers))
    with collective():
        dist.all_gather(list(found), numbers)
    return found.tolist()


def gathered(*columns: Tensor) -> tuple[Tensor, ...]:
    """Returns columns of equal length, the rows of all ranks one after the other; ranks may have different numbers.

    All columns move at once, after the numbers of rows; whole numbers, which must be below 2^31, as half of their size.
    """
    if not dist.is_initialized():
        return columns
    words = _words(columns)
    rows = torch.cat(words, 1)
    counts = [count for (count,) in of_every_rank(torch.tensor([len(rows)], device=rows.device))]
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    parts = list(rows.new_empty(len(counts), *padded.shape))
    with collective():
        dist.all_gather(parts, padded)
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
    if not dist.is_initialized():
        return rows
    counts = [count for (count,) in of_every_rank(torch.tensor([len(rows)], device=rows.device))]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = list(rows.new_empty(len(counts), *padded.shape)) if rank() == 0 else None
    with collective():
        dist.gather(padded, parts)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]) if parts else rows[:0]


def any_rank(flag: bool) -> bool:
    """Returns whether the flag is set on any rank, so that all ranks stop at the same step."""
    return _largest(int(flag)) > 0


def _largest(value: float) -> float:
    """The largest value of any rank."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(float(value))
    with collective():
        dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared)
