"""Commands in processes of their own, for what only a process can suffer: a kill, a second signal, a full disk.

They are forked from a server that has everything imported already, so that a start costs no import.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cli.train", "sae.training.run", "transformers.models.llama.modeling_llama"])
PATIENCE_S = 900.0
"""How long to wait for what must come: it ends what hangs, and no machine is so busy that it takes as long."""


class Child:
    """A process that calls `work()`, whose result is its exit code. Its output goes to a file."""

    def __init__(self, log: Path, work: Callable[[], int], environment: dict[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        changes = {**os.environ, **(environment or {})}
        self.process = FORKS.Process(target=_call, args=(str(log), work, changes), daemon=True)
        self.process.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Returns the exit code, the negative number of the signal that ended it."""
        self.process.join(PATIENCE_S)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {PATIENCE_S:g} s:\n{self.output}")
        return self.process.exitcode

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds; the child must live until then."""
        wait_until(condition, self.process.is_alive, self.log)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def wait_until(condition: Callable[[], bool], alive: Callable[[], bool], log: Path) -> None:
    """Waits until a condition holds, which must be before whoever brings it about has ended."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert alive(), f"ended early:\n{log.read_text(errors='replace')}"
        assert time.monotonic() < end, f"waited {PATIENCE_S:g} s in vain:\n{log.read_text(errors='replace')}"
        time.sleep(0.005)


def ranks(n: int) -> list[dict[str, str]]:
    """Returns the environment of every rank, as torchrun sets it."""
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]


def free_port() -> int:
    """Returns a port that nothing listens on, from a range in which the system takes none for other connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.closing(socket.socket()) as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def sae_train(argv: list[str], first: Callable[[], object] | None = None) -> int:
    """The work of a child that runs sae-train; `first` may break something in it beforehand.

    It does without what takes long and only a person or a power cut would miss: pictures, the estimate, flushing.
    """
    import torch

    import sae.training.estimate
    import sae.training.loop
    from cli.train import main

    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())  # whoever drew from a global generator would differ from run to run
    os.fsync = lambda descriptor: None
    sae.training.loop.write_report = lambda run_dir: None
    sae.training.estimate.estimate = lambda config, trust_remote_code=False: SimpleNamespace(lines=list, disk=0)
    if first is not None:
        first()
    return main(argv)


def at_step(number: int, act: Callable[[], object]) -> None:
    """Has every coder `act` when it is about to take step `number`, counted from 0."""
    from sae.training.trainer import CoderTrainer

    original = CoderTrainer.step

    def step(self, x, index):
        if index == number:
            act()
        return original(self, x, index)

    CoderTrainer.step = step


def die() -> None:
    """Ends this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def _call(log: str, work: Callable[[], int], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    raise SystemExit(work())
