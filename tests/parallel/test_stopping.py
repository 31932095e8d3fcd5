"""What signals do to one of several ranks."""

import os
import signal

import pytest

from sae.parallel.stopping import stop_flag


@pytest.fixture
def handlers():
    """The handlers of before are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_of_several_ranks_a_stop_that_is_under_way_is_left_alone(name, handlers, monkeypatch):
    """As soon as one has ended, srun and torchrun send SIGTERM to the others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with stop_flag() as flag:
        os.kill(os.getpid(), getattr(signal, name))
        assert flag()
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag()
    os.kill(os.getpid(), signal.SIGTERM)  # also on its way out, until the process has ended
    with stop_flag():
        pass
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_one_rank_under_torchrun_ends_well_though_the_signal_comes_twice(handlers, monkeypatch):
    """Slurm sends it to all processes of a job, torchrun passes its own on."""
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    with stop_flag() as flag:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert flag()


def test_of_several_ranks_none_of_which_was_stopped_the_handlers_are_put_back(handlers, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with stop_flag():
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]
