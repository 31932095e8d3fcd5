"""The few collectives needed: sums over ranks, rows of all ranks, and a flag that any of them may set."""

import torch
import torch.distributed as dist
from torch import Tensor

from sae.parallel.ranks import rank, world_size


def total(value: Tensor) -> Tensor:
    """Returns the sum of `value` over ranks."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def total_(*tensors: Tensor) -> None:
    """Replaces each tensor by its sum over ranks, one collective per data type."""
    if not dist.is_initialized():
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))


def before(count: int) -> int:
    """Returns the sum of `count` over the ranks before this one."""
    if not dist.is_initialized():
        return 0
    return int(_counts(count)[: rank()].sum())


def gathered(value: Tensor) -> Tensor:
    """Returns the rows of all ranks one after the other; ranks may have different numbers of them."""
    if not dist.is_initialized():
        return value
    counts = _counts(len(value))
    padded = torch.cat([value, value.new_zeros(int(counts.max()) - len(value), *value.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])


def _counts(own: int) -> Tensor:
    """A count of every rank."""
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = own
    return total(counts)


def any_rank(flag: bool) -> bool:
    """Returns whether the flag is set on any rank, so that all ranks stop at the same step."""
    return _largest(int(flag)) > 0


def _largest(value: float) -> float:
    """The largest value of any rank."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(float(value))
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared)
