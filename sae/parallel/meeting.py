"""How ranks meet: in a store at the address that all know, and from there in one of their own, in rank 0's process.

They wait asleep, in Python, so that a signal is heard; and who has not come is told by number. No heartbeat judges yet,
so each call of a store has a time in which it is answered: torch would ask a frozen process for ever, and knock for
`ranks.timeout_s` at the door of a dead one.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from sae.base.errors import ConfigError, Stopped
from sae.parallel import stopping
from sae.parallel.judging import Peer
from sae.parallel.launch import Launch

LONGEST_NAP_S = 0.1
FAREWELL_S = 5.0
"""How long rank 0 waits for the others to read that the meeting has failed, and they longer than it for that word."""
PARTS = 4  # of the time for an answer: a process that was suspended has lost one
LATECOMERS_S = 30.0
"""How long a stop waits for ranks that have not come yet, so that all end together."""
_meetings = count()
_opened: dict[str, TCPStore] = {}
"""Rank 0's, for as long as it runs: it may meet the others again, who may be there first."""


@dataclass
class Meeting:
    """What ranks have when all have come."""

    peers: list[Peer]
    public: Store
    """Where they have met: torch may make a group of them there."""
    store: Store
    """Their own."""
    second: Store
    """The same by another connection, for a thread that must not wait for the first."""


class _Asked:
    """A store whose calls are each answered within a time, else DistNetworkError."""

    def __init__(self, store: Store, limit_s: float) -> None:
        self._store, self._limit_s = store, limit_s

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(_answered, self._limit_s, getattr(self._store, name))


def meet(
    found: Launch,
    rank: int,
    world_size: int,
    timeout_s: float,
    deadline_s: float = 60.0,
    device: str = "cpu",
    sees: tuple[str, ...] = (),
) -> Meeting:
    """Returns the ranks and their stores when all have come.

    ConfigError on all that came if one does not come in time, or if another group meets there; Stopped, on all, if one
    is asked to stop meanwhile; RuntimeError if rank 0, once there, does not answer for `deadline_s`.
    """
    end, place = time.monotonic() + timeout_s, f"{found.address}:{found.port}"
    every, zero = [f"here/{i}" for i in range(world_size)], "rank 0"
    try:
        public = _public(found, rank, timeout_s, deadline_s, end)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own_place = PrefixStore(f"sae/{attempt}/{next(_meetings)}", public)
        here = _Asked(own_place, deadline_s)
        own = Peer.here(rank, device, sees).to_json()
        if (first := here.compare_set(every[rank], "", own)) != own.encode():
            raise ConfigError(f"MASTER_PORT: {Peer.from_json(first)} has come to {place} already; set another one")
        if here.check(every[:1]):
            zero = str(Peer.from_json(here.get(every[0])))
        store = _store(found, 0, timeout_s, is_master=True) if rank == 0 else None
        if store:
            wait_for(here, every, end, lambda: bool(stopping.asked()) or here.check(["stop"]))
            wait_for(here, every, min(end, time.monotonic() + LATECOMERS_S))  # if it is a stop that ended the waiting
            missing = [i for i, key in enumerate(every) if not here.check([key])]
            here.set("met", json.dumps([store.port, missing, bool(stopping.asked()) or here.check(["stop"])]))
        elif not wait_for(here, ["met"], end + FAREWELL_S, lambda: bool(stopping.asked())):
            here.set("stop", "")  # or the time is over
            wait_for(here, ["met"], time.monotonic() + LATECOMERS_S + FAREWELL_S)
        port, missing, stopped = json.loads(here.get("met"))
        if missing or stopped:
            here.add("read", 1)
            came = world_size - len(missing)
            wait_for(here, [], time.monotonic() + FAREWELL_S, lambda: rank > 0 or here.add("read", 0) == came)
            if stopped:
                raise Stopped("while the ranks met")
            who = ", ".join(map(str, missing[:8])) + (" ..." if missing[8:] else "")
            raise ConfigError(
                f"MASTER_ADDR: {came} of {world_size} ranks have come to {place} in {timeout_s:g} s "
                f"(ranks.timeout_s); missing: rank {who}"
            )
        peers = [Peer.from_json(text) for text in here.multi_get(every)]
        if not found.address and peers[0].host != peers[rank].host:  # only who made the caller's group knows where
            found = replace(found, address=peers[0].host)
        knock = partial(_answered, deadline_s, _store, found, port, timeout_s)
        return Meeting(peers, own_place, store or knock(), knock())
    except dist.DistError as error:
        raise RuntimeError(f"{zero} has gone from {place}, where all ranks were to meet: {_reason(error)}") from error


def wait_for(
    store: Store | _Asked, keys: list[str], end: float = float("inf"), other: Callable[[], bool] = lambda: False
) -> bool:
    """Waits until all keys are set, asleep in Python, so that a signal is heard; returns whether they are.

    Also ends at a time of `time.monotonic`, and when something else holds.
    """
    nap = 0.001
    while not (keys and store.check(keys)):
        if other() or time.monotonic() > end:
            return False
        time.sleep(nap)
        nap = min(LONGEST_NAP_S, 1.5 * nap)
    return True


def _answered(limit_s: float, call: Callable[..., Any], *args: Any) -> Any:
    """Returns what a call returns; DistNetworkError if it takes longer, less the time this process was suspended."""
    answer: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def ask() -> None:
        try:
            answer.put((call(*args), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    for _ in range(PARTS):
        try:
            returned, error = answer.get(timeout=limit_s / PARTS)
        except Empty:
            continue
        if error is not None:
            raise error
        return returned
    raise dist.DistNetworkError(f"no answer for {limit_s:g} s (ranks.deadline_s)")


def _public(found: Launch, rank: int, timeout_s: float, deadline_s: float, end: float) -> Store:
    """Returns the store at the address that all know: torchrun's, the caller's, or one that rank 0 opens."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    place = f"{found.address}:{found.port}"
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        try:
            if place not in _opened:
                _opened[place] = _store(found, found.port, timeout_s, is_master=True)
            return _opened[place]
        except dist.DistError as error:
            raise ConfigError(f"MASTER_PORT: rank 0 cannot open {place}: {_reason(error)}; set another one") from error
    asked = False
    while True:  # torch would wait as well, but deaf, and with pages of what went wrong on the way
        try:
            socket.create_connection((found.address, found.port), 5.0).close()
            return _answered(deadline_s, _store, found, found.port, timeout_s)
        except OSError as error:
            if stopping.asked() and not asked:  # rank 0 is yet to be told
                asked, end = True, min(end, time.monotonic() + LATECOMERS_S)
            if time.monotonic() > end:
                if asked:
                    raise Stopped("while the ranks met") from None
                raise ConfigError(
                    f"MASTER_ADDR: rank {rank} ({found.launcher}) has not reached rank 0 at {place} in {timeout_s:g} s "
                    f"(ranks.timeout_s): {error.strerror or error}"
                ) from None
            time.sleep(LONGEST_NAP_S)


def _store(found: Launch, port: int, timeout_s: float, is_master: bool = False) -> TCPStore:
    wait = timedelta(seconds=timeout_s)
    address = found.address or "127.0.0.1"
    return TCPStore(address, port, is_master=is_master, timeout=wait, wait_for_workers=False)


def _reason(error: Exception) -> str:
    return str(error).split("Exception raised from")[0].split("frame #")[0].strip().splitlines()[-1]
