"""The ranks of this process's group: who they are, how they join, and what one of them knows of the others."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from sae.base.errors import ConfigError
from sae.base.progress import during
from sae.base.settings import choose
from sae.parallel.heartbeat import Heartbeat
from sae.parallel.judging import Peer
from sae.parallel.launch import BY_HAND, Launch, launch
from sae.parallel.meeting import Meeting, meet

log = logging.getLogger(__name__)
BACKENDS = ("auto", "gloo", "nccl")


@dataclass(frozen=True)
class RanksConfig:
    """Several processes that train together; on one, nothing of it matters."""

    backend: str = "auto"
    """What sums over ranks: gloo, nccl (between GPUs), or auto: nccl if there is a GPU. gloo takes GPU tensors, too."""
    deadline_s: float = 60.0
    """A rank that has not been heard for so long is lost, and the others end; each is heard twelve times as often."""
    timeout_s: float = 600.0
    """How long the sum of a step may take before the ranks that do not come to it are named, and all end."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        choose("ranks.backend", self.backend, BACKENDS)
        for name in ("deadline_s", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"ranks.{name}: {getattr(self, name)} must be above 0")


@dataclass(frozen=True)
class Share:
    """Which of several ranks does a part of their work."""

    rank: int = 0
    world_size: int = 1

    def of(self, n: int) -> range:
        """Returns this rank's part of n things in a row; parts differ by one at the most."""
        return range(self.rank * n // self.world_size, (self.rank + 1) * n // self.world_size)


ALONE = Share()


@dataclass(frozen=True)
class Axis(Share):
    """Some ranks that move tensors among themselves; `rank` is the place of this one there."""

    group: dist.ProcessGroup | None = None
    """None: this one is alone."""

    @property
    def moves(self) -> bool:
        """Returns whether there is a group, if only of this rank, so that collectives go through it."""
        return self.group is not None


ITSELF = Axis()
"""A rank that moves nothing."""


def everyone() -> Axis:
    """Returns all ranks."""
    return Axis(rank(), world_size(), dist.group.WORLD if in_group() else None)


class Group:
    """The ranks that work together, and the store through which they tell each other what is no tensor."""

    def __init__(self, store: Store, heart: Heartbeat, peers: list[Peer], gpus: range) -> None:
        self.store, self.heart, self.peers, self.gpus = store, heart, peers, gpus
        self.blocks = [("", count())]
        """That are open, one within the other, with the numbers of what is agreed on in each."""

    def next_key(self) -> str:
        """Returns the name of what is agreed on next; all ranks name it alike."""
        name, numbers = self.blocks[-1]
        return f"{name}/{next(numbers)}"

    @contextmanager
    def block(self) -> Iterator[None]:
        """Counts apart what is agreed on within the block: a rank that fails there does not come to all of it."""
        self.blocks.append((self.next_key(), count()))
        try:
            yield
        finally:
            self.blocks.pop()

    @property
    def failures(self) -> list[str]:
        """Returns the keys by which a rank that fails in one of the open blocks says so, the innermost last."""
        return [f"failed{name}" for name, _ in self.blocks[1:]]


_joined: Group | None = None


def group() -> Group | None:
    """Returns the group of this process, None when alone."""
    return _joined


def in_group() -> bool:
    """Returns whether this process is one of a group, if only of itself."""
    return dist.is_initialized()


def rank() -> int:
    """Returns this process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_share() -> Share:
    """Returns this process's share of what all do."""
    return Share(rank(), world_size())


def own_gpus() -> range:
    """Returns the numbers of this rank's GPUs, at least one; a model that is spread goes to all, a coder to the first.

    A launcher may show all of a host's to each of its ranks, or to each some: what several are shown they share out.
    """
    if _joined:
        return _joined.gpus
    n, found = max(1, torch.cuda.device_count()), launch()
    first = found.local_rank % n
    return range(n) if found.world_size < 2 and not in_group() else range(first, first + 1)


def shared_out(peers: list[Peer], number: int) -> range:
    """Returns which of the GPUs that a rank is shown are its own: a part in a row, or one that it must share."""
    own = peers[number].sees
    others = [peer.rank for peer in peers if not set(own).isdisjoint(peer.sees)] or [number]
    place, n = others.index(number), max(1, len(own))
    return Share(place, len(others)).of(n) if len(others) <= n else range(place % n, place % n + 1)


def on_this_host() -> int:
    """Returns how many ranks run on this host, this one included."""
    return sum(peer.host == _joined.peers[rank()].host for peer in _joined.peers) if _joined else 1


@contextmanager
def collective() -> Iterator[None]:
    """Guards one collective: if it fails since another rank is lost, the error says which, where and at what."""
    if _joined is None:
        yield
    else:
        with _joined.heart.collective():
            yield


@contextmanager
def process_group(config: RanksConfig = RanksConfig()) -> Iterator[None]:
    """Joins the group that the launcher names, if any, and leaves it at the end; within one, does nothing.

    A group that the caller has joined by torch.distributed is used, and left to the caller. ConfigError if the ranks
    do not meet in `ranks.timeout_s`, or if the caller's group cannot sum what lies on CPUs.
    """
    global _joined
    found, theirs = launch(), dist.is_initialized()
    if _joined or (found.world_size < 2 and not theirs):
        yield
        return
    backend = _backend(config)
    if theirs and "cpu" not in dist.get_backend_config():
        raise ConfigError(
            "ranks: the group that was joined by torch.distributed sums GPU tensors alone; "
            "join it by init_process_group('cpu:gloo,cuda:nccl')"
        )
    number, n = (dist.get_rank(), dist.get_world_size()) if theirs else (found.rank, found.world_size)
    met = meet(found, number, n, config.timeout_s, config.deadline_s, _device(), _visible())
    gpus = shared_out(met.peers, number)
    heart = Heartbeat(met.second, met.peers, number, config.deadline_s, config.timeout_s)
    try:
        with heart:
            if not theirs:
                with during("joining"), heart.explained():
                    _join(met, number, backend, config.timeout_s, gpus)
            _joined = Group(met.store, heart, met.peers, gpus)
            log.info("%s", described(found, met.peers))
            yield
    finally:  # a group that lives until the interpreter ends may abort it: its threads still run
        _joined = None
        if not theirs and dist.is_initialized():
            dist.destroy_process_group()


def _device() -> str:
    return torch.cuda.get_device_name(own_gpus()[0]) if torch.cuda.is_available() else "cpu"


def _visible() -> tuple[str, ...]:
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(str(torch.cuda.get_device_properties(number).uuid) for number in range(n))


def _backend(config: RanksConfig) -> str:
    gpus = torch.cuda.is_available()
    if config.backend == "nccl" and not gpus:
        raise ConfigError("ranks.backend: nccl sums between GPUs, and there is none here; use gloo or auto")
    return "gloo" if config.backend == "gloo" or not gpus else "cpu:gloo,cuda:nccl"


def _join(met: Meeting, number: int, backend: str, timeout_s: float, gpus: range) -> None:
    """Makes torch's group of those that have met."""
    if torch.cuda.is_available():
        torch.cuda.set_device(gpus[0])
    # The heartbeat sees what takes too long. gloo's clock goes on while a job is suspended, and would end it then.
    wait = timedelta(days=1) if backend == "gloo" else timedelta(seconds=timeout_s)
    dist.init_process_group(backend, timeout=wait, store=met.public, rank=number, world_size=len(met.peers))


def described(found: Launch, peers: list[Peer]) -> str:
    """Returns one line on the ranks: how many, on which hosts, what they compute on and what sums over them."""
    hosts = list(dict.fromkeys(peer.host for peer in peers))
    on = "1 host" if len(hosts) == 1 else f"{len(hosts)} hosts"
    shown = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
    devices = ", ".join(dict.fromkeys(peer.device for peer in peers))
    each = len(shared_out(peers, 0))
    devices += f", {each} a rank" if each > 1 else ""
    how = found.launcher if found.launcher != BY_HAND else f"by {BY_HAND}"
    return f"ranks        {len(peers)} ({how}) on {on} ({shown}); {devices}; {dist.get_backend()}"
