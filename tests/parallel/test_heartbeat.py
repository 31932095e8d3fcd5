"""Hearts of several ranks in one process, over a real store; what would end the process is kept instead."""

import os
import sys
import threading
import time
from contextlib import ExitStack, suppress
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from sae.base.errors import ConfigError
from sae.base.progress import Watch, during
from sae.parallel import stopping
from sae.parallel.heartbeat import Heartbeat
from sae.parallel.judging import Peer

DEADLINE_S = 1.0
PATIENCE_S = 60.0


class Connection:
    """One rank's connection to the store, whose calls may be made to wait for ever, or to fail."""

    def __init__(self, store: TCPStore) -> None:
        self.store, self.open, self.broken = store, threading.Event(), False
        self.open.set()

    def __getattr__(self, name: str):
        def call(*args):
            self.open.wait()
            if self.broken:
                raise dist.DistNetworkError("Connection reset by peer\nException raised from recvBytes")
            return getattr(self.store, name)(*args)

        return call


class Hearts:
    """The hearts of n ranks."""

    def __init__(self, monkeypatch, n: int, deadline_s: float = DEADLINE_S, timeout_s: float = PATIENCE_S) -> None:
        wait = timedelta(seconds=PATIENCE_S)
        self.server = TCPStore("127.0.0.1", 0, is_master=True, timeout=wait, wait_for_workers=False)
        clients = [TCPStore("127.0.0.1", self.server.port, timeout=wait, wait_for_workers=False) for _ in range(n)]
        self.stores = [Connection(client) for client in clients]
        peers = [Peer(i, f"n{i}", 10 + i, "cpu") for i in range(n)]
        self.hearts = [Heartbeat(store, peers, i, deadline_s, timeout_s) for i, store in enumerate(self.stores)]
        self.ended: dict[int, tuple[str, int]] = {}
        self.said: list[str] = []
        original = Heartbeat._end

        def end(heart, text, code):
            self.ended[heart.rank] = (text, code)
            with suppress(SystemExit):
                original(heart, text, code)
            heart.over.set()

        monkeypatch.setattr(Heartbeat, "_end", end)
        monkeypatch.setattr(os, "_exit", sys.exit)
        monkeypatch.setattr(stopping, "say", self.said.append)

    def beat(self) -> ExitStack:
        """Lets all hearts beat, until the context ends."""
        stack = ExitStack()
        for heart in self.hearts:
            for thread in heart.threads:
                thread.start()
                stack.callback(thread.join)
        stack.callback(self._cease)
        return stack

    def freeze(self, rank: int) -> None:
        """Has a rank neither talk nor judge."""
        self.stores[rank].open.clear()
        self.hearts[rank].left = True

    def _cease(self) -> None:
        for heart in self.hearts:
            heart.over.set()
            heart.wake.set()
            self.stores[heart.rank].open.set()

    def wait_for(self, *ranks: int) -> dict[int, tuple[str, int]]:
        """Waits until just these have ended; returns why and with which code."""
        wait_until(lambda: self.ended.keys() == set(ranks), lambda: self.ended)
        return self.ended


def wait_until(holds, told) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, told()
        time.sleep(0.01)


def test_a_rank_that_is_not_heard_ends_the_others_who_say_what_it_did(monkeypatch):
    hearts = Hearts(monkeypatch, 3)
    with hearts.beat(), Watch().stage("training", None, "steps", 118, visible=False), during("saving"):
        wait_until(lambda: hearts.hearts[0].heard[2].text, lambda: "never heard")
        time.sleep(DEADLINE_S / 4)
        hearts.freeze(2)
        ended = hearts.wait_for(0, 1)
    assert ended[0] == ended[1]
    assert ended[0][1] == 1
    assert ended[0][0].startswith("rank 2 (n2, pid 12) was last heard 1 s ago, training at step 118, saving")
    assert hearts.said == [f"error: {ended[0][0]}; all ranks end"] * 2


@pytest.mark.slow
def test_a_store_that_never_answers_ends_the_others_although_they_wait_for_it(monkeypatch):
    hearts = Hearts(monkeypatch, 3)
    with hearts.beat():
        wait_until(lambda: all(heart.heard[0].text for heart in hearts.hearts), lambda: "never heard")
        for store in hearts.stores:
            store.open.clear()
        ended = hearts.wait_for(0, 1, 2)
    assert [ended[i][0].startswith("rank 0 (n0, pid 10) was last heard 1 s ago") for i in (1, 2)] == [True, True]


def test_a_connection_that_breaks_ends_a_rank_at_once(monkeypatch):
    hearts = Hearts(monkeypatch, 2, deadline_s=4 * PATIENCE_S)
    with hearts.beat():
        wait_until(lambda: hearts.hearts[1].heard[0].text, lambda: "never heard")
        hearts.stores[1].broken = True
        ended = hearts.wait_for(1)
    assert ended[1][0].startswith(
        "the connection to rank 0 broke (Connection reset by peer): rank 0 (n0, pid 10) was last heard "
    )


def leave(heart: Heartbeat, error: BaseException | None = None) -> threading.Thread:
    thread = threading.Thread(target=heart.__exit__, args=(None, error, None), daemon=True)
    thread.start()
    return thread


def test_the_error_of_one_ends_the_others_with_its_code(monkeypatch):
    hearts = Hearts(monkeypatch, 3, deadline_s=PATIENCE_S)
    with hearts.beat():
        leave(hearts.hearts[1], ConfigError("coder: no luck\nat all"))
        ended = hearts.wait_for(0, 2)
    assert ended[0] == ended[2] == ("rank 1 (n1, pid 11) failed: coder: no luck at all", 2)


@pytest.mark.slow
def test_the_error_of_rank_0_is_read_before_its_store_goes(monkeypatch):
    hearts = Hearts(monkeypatch, 3, deadline_s=PATIENCE_S)
    with hearts.beat():
        gone = leave(hearts.hearts[0], ValueError("no luck"))
        ended = hearts.wait_for(1, 2)
        gone.join(PATIENCE_S)
    assert ended[1] == ended[2] == ("rank 0 (n0, pid 10) failed: no luck", 1)


@pytest.mark.slow
def test_an_error_that_all_know_of_ends_none_of_the_others(monkeypatch):
    hearts = Hearts(monkeypatch, 2)
    known = ValueError("of rank 0")
    with hearts.beat():
        hearts.hearts[1].known = known
        told = RuntimeError("as run.py says it")
        told.__cause__ = known
        leave(hearts.hearts[1], told).join(PATIENCE_S)
        time.sleep(2 * DEADLINE_S)
    assert hearts.ended == {}


@pytest.mark.slow
def test_rank_0_stays_until_all_have_left_or_are_silent(monkeypatch):
    hearts = Hearts(monkeypatch, 3)
    with hearts.beat():
        gone = leave(hearts.hearts[0])
        leave(hearts.hearts[1]).join(PATIENCE_S)
        gone.join(DEADLINE_S)
        assert gone.is_alive()
        hearts.freeze(2)
        gone.join(PATIENCE_S)
        assert not gone.is_alive()
    assert hearts.ended == {}


@pytest.mark.slow
def test_a_collective_that_fails_waits_for_the_verdict(monkeypatch):
    hearts = Hearts(monkeypatch, 2)
    began = time.monotonic()
    with hearts.beat(), pytest.raises(RuntimeError, match="closed"), hearts.hearts[1].collective():
        raise RuntimeError("Connection closed by peer\nframe #0")
    assert time.monotonic() - began > 2 * DEADLINE_S  # here nothing has ended the process meanwhile
    text = "a sum over ranks failed at rank 1 (n1, pid 11): Connection closed by peer; every rank lives"
    assert hearts.ended[0][0].startswith(text)
    assert hearts.ended[1] == hearts.ended[0]


@pytest.mark.slow
def test_a_rank_that_lives_but_does_not_come_to_a_sum_is_named(monkeypatch):
    hearts = Hearts(monkeypatch, 3, timeout_s=2.0)
    hearts.hearts[0].begun = hearts.hearts[2].begun = 8
    hearts.hearts[1].begun = 7
    hearts.hearts[0].inside = hearts.hearts[2].inside = True
    with hearts.beat():
        ended = hearts.wait_for(0, 1, 2)
    assert len(set(ended.values())) == 1
    assert "longer than ranks.timeout_s, 2 s: rank 1 (n1, pid 11) has not come to it" in ended[0][0]


@pytest.mark.slow
def test_a_process_that_was_suspended_has_not_waited_for_the_others(monkeypatch):
    hearts = Hearts(monkeypatch, 2, deadline_s=PATIENCE_S)
    now = time.monotonic
    with hearts.beat():
        wait_until(lambda: hearts.hearts[0].heard[1].text, lambda: "never heard")
        monkeypatch.setattr(time, "monotonic", lambda: now() + 10 * PATIENCE_S)
        time.sleep(1.0)
        assert hearts.ended == {}


@pytest.mark.slow
def test_the_threads_cost_next_to_nothing(monkeypatch):
    hearts = Hearts(monkeypatch, 4, deadline_s=60.0)
    with hearts.beat():
        began, cpu = time.monotonic(), time.process_time()
        time.sleep(2.0)
        share = (time.process_time() - cpu) / (time.monotonic() - began)
    assert share < 0.04  # of one core, four ranks and the store
