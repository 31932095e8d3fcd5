"""Ranks as threads of one process: each meets the others with what a launcher would have told it."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import pytest
from rigs.children import free_port

from sae.base.errors import ConfigError, Stopped
from sae.parallel import meeting, stopping
from sae.parallel.launch import Launch
from sae.parallel.meeting import meet


@pytest.fixture
def come(monkeypatch):
    """Returns what becomes of ranks that come, given their numbers, of a group of n."""
    monkeypatch.setattr(meeting, "_meetings", repeat(0))  # each thread's first
    monkeypatch.setattr(meeting, "_opened", {})
    port = free_port()

    def come(*numbers: int, n: int, timeout_s: float = 60.0):
        def one(rank):
            try:
                return meet(Launch("srun", rank, n, rank, "127.0.0.1", port), rank, n, timeout_s)
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(numbers)) as pool:
            return list(pool.map(one, numbers))

    return come


def test_all_that_come_know_each_other_and_share_a_store_of_their_own(come):
    met = come(2, 0, 1, n=3)
    assert [[peer.rank for peer in one.peers] for one in met] == [[0, 1, 2]] * 3
    met[0].store.set("word", "heard")
    assert [one.second.get("word") for one in met] == [b"heard"] * 3
    met[0].public.set("other", "")
    assert not met[1].store.check(["other"])


def test_one_that_does_not_come_is_told_by_number_on_all_that_came(come):
    began = time.monotonic()
    for error in come(0, 2, n=4, timeout_s=0.5):
        assert isinstance(error, ConfigError)
        assert str(error).startswith("MASTER_ADDR: 2 of 4 ranks have come to 127.0.0.1:")
        assert str(error).endswith("in 0.5 s (ranks.timeout_s); missing: rank 1, 3")
    assert time.monotonic() - began < 30


def test_without_rank_0_the_address_is_told(come):
    (error,) = come(1, n=2, timeout_s=0.5)
    assert isinstance(error, ConfigError)
    assert "rank 1 (srun) has not reached rank 0 at 127.0.0.1:" in str(error)
    assert "in 0.5 s (ranks.timeout_s): Connection refused" in str(error)


def test_a_rank_of_another_run_at_the_same_port_is_refused(come, monkeypatch):
    first = come(0, 1, n=2)
    assert not any(isinstance(one, Exception) for one in first)
    monkeypatch.setattr("sae.parallel.judging.getpid", lambda: 1)
    (error,) = come(1, n=2)
    assert isinstance(error, ConfigError)
    assert str(error).startswith("MASTER_PORT: rank 1 (")


def test_a_port_that_something_else_listens_on_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"MASTER_PORT: rank 0 cannot open 127.0.0.1:{port}: .*; set another one"):
            meet(Launch("srun", 0, 2, 0, "127.0.0.1", port), 0, 2, 60.0)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGSTOP], ids=lambda number: number.name
)
def test_rank_0_that_is_lost_when_its_store_is_about_to_be_opened_is_told(number, monkeypatch):
    """Of a dead process torch would ask for ranks.timeout_s, of a frozen one for ever."""
    port = free_port()
    rank_0 = (
        "import time; from sae.parallel.launch import Launch; from sae.parallel.meeting import meet\n"
        f"met = meet(Launch('srun', 0, 2, 0, '127.0.0.1', {port}), 0, 2, 60.0)\ntime.sleep(600)"
    )
    zero = subprocess.Popen([sys.executable, "-c", rank_0])
    real = meeting._store

    def store(found, port_there, timeout_s, **options):
        if port_there != port:  # rank 0's own, of which it has told: what lies behind the meeting
            os.kill(zero.pid, number)
            if number == signal.SIGKILL:
                zero.wait()
        return real(found, port_there, timeout_s, **options)

    monkeypatch.setattr(meeting, "_store", store)
    monkeypatch.setattr(meeting, "_meetings", repeat(0))
    try:
        with pytest.raises(RuntimeError) as raised:
            meet(Launch("srun", 1, 2, 1, "127.0.0.1", port), 1, 2, 60.0, deadline_s=0.5)
    finally:
        zero.kill()
        zero.wait()
    assert str(raised.value).startswith(f"rank 0 ({socket.gethostname()}, pid {zero.pid}) has gone from 127.0.0.1:")
    assert str(raised.value).endswith("no answer for 0.5 s (ranks.deadline_s)")


def test_a_signal_while_others_are_waited_for_stops_all_that_came(come, monkeypatch):
    monkeypatch.setattr(meeting, "LATECOMERS_S", 0.2)
    with stopping.stop_flag():
        signal.raise_signal(signal.SIGTERM)
        stopped = come(0, 1, n=3)
    assert [type(error) for error in stopped] == [Stopped, Stopped]
