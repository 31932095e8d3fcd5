"""What ranks tell of themselves, and what follows from it: who is lost, stuck or has failed. Pure, without a clock."""

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from os import getpid

Verdict = tuple[str, int]
"""Why a rank ends, and its exit code."""
GRACE_S = 1.0
"""In which the others may meet an error themselves that one rank tells of: its text is then their own."""
WAITING = "waiting for the others"  # what a rank does until all have come to what they agree on
QUICK_S = 5.0
"""A deadline for those that must be dead, since a connection to one of them broke."""


@dataclass(frozen=True)
class Peer:
    """Who a rank is."""

    rank: int
    host: str
    pid: int
    device: str = "cpu"
    """What it computes on."""
    sees: tuple[str, ...] = ()
    """The GPUs that it is shown, by what tells them from all others."""

    @classmethod
    def here(cls, rank: int, device: str = "cpu", sees: tuple[str, ...] = ()) -> "Peer":
        """Returns who this process is."""
        return cls(rank, socket.gethostname(), getpid(), device, sees)

    def to_json(self) -> str:
        """Returns it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> "Peer":
        """Returns what `to_json` has written."""
        read = json.loads(text)
        return cls(**{**read, "sees": tuple(read["sees"])})

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    count: int = 0
    """Grows, so that no two are equal."""
    doing: str = "starting"
    begun: int = 0
    """The collectives it has begun, the last of which it may be in."""
    inside: bool = False
    """Whether its main thread sits in one."""
    signal: str = ""
    """By which it was asked to stop."""
    asked: int = -1
    """Of rank 0: the rank that was asked to stop, if any."""
    broken: str = ""
    """Why a collective of its failed, in one line."""
    left: bool = False
    """Whether it leaves, so that its silence means nothing."""
    verdict: Verdict | None = None
    """Why it leaves, if by an error of which the others do not know; of rank 0, else, why all end."""

    def to_json(self) -> str:
        """Returns it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> "Beat":
        """Returns what `to_json` has written."""
        read = json.loads(text)
        return cls(**{**read, "verdict": read["verdict"] and tuple(read["verdict"])})


@dataclass
class Heard:
    """What was heard of a rank, and when, in seconds of the listener's clock."""

    peer: Peer
    text: bytes = b""
    beat: Beat = field(default_factory=Beat)
    at: float = 0.0
    moved: float = 0.0
    """When it began another collective."""
    failed: float = 0.0
    broken: float = 0.0

    def hear(self, text: bytes, now: float) -> None:
        """Notes what the rank says now."""
        if text == self.text:
            return
        beat, before = Beat.from_json(text), self.beat
        self.text, self.beat, self.at = text, beat, now
        self.moved = now if beat.begun != before.begun else self.moved
        self.failed = now if beat.verdict and not before.verdict else self.failed
        self.broken = now if beat.broken and not before.broken else self.broken

    def silent(self, now: float, deadline: float) -> bool:
        """Returns whether it should have been heard since."""
        return not self.beat.left and now - self.at > deadline

    def said(self, now: float) -> str:
        """Returns when it was last heard, and what it did then."""
        return f"{self.peer} was last heard {now - self.at:.0f} s ago, {self.beat.doing}"


def judged(heard: Sequence[Heard], me: int, now: float, deadline: float, timeout: float) -> Verdict | None:
    """Returns why rank `me` ends, by what it has heard of others (rank 0: of itself, too); None if it goes on."""
    others = [one for one in heard if one.peer.rank != me]
    for one in others:
        if one.beat.verdict and not one.beat.left:  # rank 0's on all
            return one.beat.verdict
        if one.beat.verdict and now - one.failed >= min(GRACE_S, deadline / 4):
            return f"{one.peer} {one.beat.verdict[0]}", one.beat.verdict[1]
    broken = [one for one in heard if one.beat.broken]
    patience = min(deadline, max(deadline / 4, QUICK_S)) if broken else deadline
    if lost := [one for one in others if one.silent(now, patience)]:
        return "; ".join(one.said(now) for one in lost), 1
    if me != 0:
        return None
    here = [one for one in heard if not one.beat.left]
    ended = [one for one in others if one.beat.left and now - one.at > deadline]
    if ended and (waits := next((one.peer for one in here if one.beat.doing.endswith(WAITING)), None)):
        return f"{ended[0].peer} has ended, and {waits} waits for it", 1
    most = max((one.beat.begun for one in here), default=0)
    behind = [one for one in here if one.beat.begun < most]
    waiting = bool(behind) or any(one.beat.inside for one in here)
    if broken and now - min(one.broken for one in broken) > deadline:
        first = min(broken, key=lambda one: one.broken)
        late = "; " + _late(behind) if behind else ""
        return f"a sum over ranks failed at {first.peer}: {first.beat.broken}; every rank lives{late}", 1
    if waiting and now - max(one.moved for one in here) > timeout:
        what = _late(behind) if behind else "all ranks sit in the same one, so that the network may be at fault"
        return f"a sum over ranks has taken longer than ranks.timeout_s, {timeout:g} s: {what}", 1
    return None


def _late(behind: Sequence[Heard]) -> str:
    return "; ".join(f"{one.peer} has not come to it, {one.beat.doing}" for one in behind)
