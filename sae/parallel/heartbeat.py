"""A thread per rank that says where it is and looks whether the others still do; it ends a rank whose peer is lost.

Rank 0 reads what all say and writes a verdict; the others read rank 0 and the verdict. So a rank that sits in a
collective ends as well, whatever the backend.
"""

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Peer:
    """Who a rank is."""

    rank: int
    host: str
    pid: int
    device: str
    """What it computes on, as far as that decides the last digits."""

    @classmethod
    def here(cls, rank: int) -> "Peer":
        """Returns who this process is."""
        return cls(rank, socket.gethostname(), os.getpid(), "cpu")

    def to_json(self) -> str:
        """Returns it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> "Peer":
        """Returns what `to_json` has written."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


class Heartbeat:
    """The thread, while its context lasts."""

    def __init__(self, store: Store, peers: list[Peer], rank: int, deadline_s: float) -> None:
        self.store, self.peers, self.rank, self.deadline_s = store, peers, rank, deadline_s

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(dist.DistError):
            self.store.add("left", 1)
            if self.rank == 0:
                import time

                while self.store.add("left", 0) < len(self.peers):
                    time.sleep(0.01)
