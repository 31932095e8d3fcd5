"""Ranks, as torchrun and `accelerate launch` set them in the environment, and the few collectives needed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sae.base.errors import Stopped

STOPPED = 0.5  # less than any error: where one rank failed and another was stopped, the third tells of the failure
PATIENCE = timedelta(days=1)  # rank 0 may tokenize or evaluate for hours; launchers end the ranks of one that died


@dataclass(frozen=True)
class Share:
    """Which of several ranks does a part of their work."""

    rank: int = 0
    world_size: int = 1


ALONE = Share()


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the process group that the environment names, if any, and leaves it at the end.

    A group that the caller has joined is used, and left to the caller.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:  # a group that lives until the interpreter ends may abort it: its threads still run
        dist.destroy_process_group()


def rank() -> int:
    """Returns this process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_share() -> Share:
    """Returns this process's share of what all do."""
    return Share(rank(), world_size())


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


class PeerError(RuntimeError):
    """The error of another rank, which says what it is; the exit code is the same."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another rank failed, and said why")
        self.exit_code = exit_code


@contextmanager
def together() -> Iterator[None]:
    """Waits for all ranks at the end of the block, and ends them all if it failed on one.

    A rank that waits for one that is gone would wait for ever. The block itself must not call another collective.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    code = getattr(failed, "exit_code", 1) if failed else 0
    worst = _largest(code if code != Stopped.exit_code else STOPPED)
    if failed:
        raise failed
    if worst:
        raise Stopped("with another rank") if worst == STOPPED else PeerError(int(worst))


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Lets rank 0 fill a cache that the others then read."""
    if rank() == 0:
        with together():
            yield
    else:
        with together():
            pass
        yield


def _largest(value: float) -> float:
    """The largest value of any rank."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(float(value))
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared)
