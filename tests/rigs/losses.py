"""Ranks of sae-train that lose one of theirs in a phase, and what the others make of it."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

from rigs.children import Child, ranks, sae_train
from rigs.fakes import tiny_config
from rigs.runs import assert_equal

from sae.base.settings import to_yaml

DEADLINE_S = 5.0
SLACK_S = 5.0
CHANGES = {"activations.source": "disk", "eval.every_steps": 8, "ranks.deadline_s": DEADLINE_S}
PHASES = {
    "joining": ("sae.parallel.ranks", "_join", 1),
    "loading": ("sae.training.run", "load_models", 1),
    "tokenizing": ("sae.text.tokenizing", "documents", 1),
    "storing": ("sae.stream.sources.LiveSource", "read", 3),
    "measuring": ("sae.training.preparing", "sample_activations", 1),
    "training": ("sae.training.trainer.CoderTrainer", "step", 8),
    "saving": ("os", "rename", 2),  # of a checkpoint
    "evaluating midway": ("sae.training.loop.Run", "_evaluate", 1),
    "the last evaluation": ("sae.training.loop.Run", "_evaluate", 3),
}
"""What rank 0 is held in: a call of a function, while the others wait for it, or are about to."""
NAMED = re.compile(r"rank (\d+) \([^,]*, pid (\d+)\) (?:was last heard|has gone)")
DEAF = (("joining", 0), ("training", 1))
"""Where a signal is taken a little later: when there is a flag, and when a sum has come through."""
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)


@dataclass(frozen=True)
class Draw:
    """Who is lost, when, and how."""

    n: int
    rank: int
    phase: str
    signal: signal.Signals

    def __str__(self) -> str:
        return f"{self.signal.name} to rank {self.rank} of {self.n}, {self.phase}"


def draws(count: int, seed: int = 0) -> list[Draw]:
    """Returns draws that go through all phases, ranks and signals about equally often."""
    draw = random.Random(seed)
    phases, who = list(PHASES), [(2, 0), (2, 1), (3, 2), (3, 0), (3, 1)]
    draw.shuffle(phases)
    draw.shuffle(who)
    signals = [signal for signal in SIGNALS for _ in phases]  # the other one in the next round of phases
    return [
        Draw(*ranks, phase, number)
        for _, ranks, phase, number in zip(range(count), cycle(who), cycle(phases), cycle(signals), strict=False)
    ]


def hold(phase: str, folder: Path) -> None:
    """Has rank 0 say when it is in a phase, and stay there until it may go on."""
    if os.environ["RANK"] != "0":
        return
    where, name, call = PHASES[phase]
    owner = _named(where)
    original, calls = getattr(owner, name), []

    def held(*args, **kwargs):
        if phase != "saving" or "/checkpoints/step-" in str(args[1]):
            calls.append(None)
            if len(calls) == call:
                (folder / "here").touch()
                while not (folder / "go").exists():
                    time.sleep(0.01)
        return original(*args, **kwargs)

    setattr(owner, name, held)


def _named(where: str) -> object:
    """Returns a module, or a class in one."""
    import importlib

    try:
        return importlib.import_module(where)
    except ModuleNotFoundError:
        module, name = where.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


@dataclass
class Outcome:
    """What the others made of a loss."""

    seconds: float
    codes: list[int]
    output: list[str]
    named: list[bool]
    """Whether each names the rank that is lost, and no other."""


class Losses:
    """Runs below a folder, each of which loses a rank and goes on."""

    def __init__(self, folder: Path, model: Path, text: Path) -> None:
        self.folder, self.config = folder, folder / "config.yaml"
        self.config.write_text(to_yaml(tiny_config(model, text, CHANGES)), encoding="utf-8")

    def start(self, run: Path, n: int, first: Callable[[], object] | None = None) -> list[Child]:
        """Starts the ranks of a run, which goes on if it has begun."""
        argv = ["--config", str(self.config), "--run-dir", str(run), "--resume", "auto"]
        cache = {"SAE_CACHE": str(run.parent / "cache")}
        return [
            Child(run.parent / f"{run.name}-{env['RANK']}.txt", partial(sae_train, argv, first), {**env, **cache})
            for env in ranks(n)
        ]

    def whole(self, n: int) -> Path:
        """Returns the folder of a run of n ranks that nothing disturbed."""
        run = self.folder / f"whole-{n}" / "run"
        if not run.exists():
            children = self.start(run, n)
            assert [child.wait() for child in children] == [0] * n, [child.output for child in children]
        return run

    def held(self, draw: Draw) -> tuple[Path, list[Child]]:
        """Starts a run whose rank 0 is held in a phase, which the others wait for; returns its folder and the ranks."""
        folder = self.folder / re.sub(r"\W+", "-", str(draw))
        folder.mkdir()
        children = self.start(folder / "run", draw.n, partial(hold, draw.phase, folder))
        children[0].wait_for((folder / "here").exists)
        if draw.phase != "joining":
            time.sleep(2 * DEADLINE_S / 12)  # the others come to where they wait
        children[draw.rank].kill(draw.signal)
        return folder, children

    def lose(self, draw: Draw) -> Outcome:
        """Starts a run and takes a rank from it; raises unless it goes on to the end of the undisturbed one."""
        folder, children = self.held(draw)
        began, lost = time.monotonic(), children[draw.rank]
        (folder / "go").touch()
        others = [child for child in children if child is not lost]
        codes = [child.wait() for child in others]
        seconds = time.monotonic() - began
        lost.kill()
        lost.wait()
        output = [child.output for child in others]
        named = [_named_in(text) == [(draw.rank, lost.process.pid)] for text in output]
        self.go_on(folder / "run", draw.n)
        return Outcome(seconds, codes, output, named)

    def stop(self, draw: Draw) -> list[str]:
        """Starts a run and asks a rank of it to stop; returns what all have said, if all have ended as asked.

        Raises unless it goes on to the end of the undisturbed one.
        """
        folder, children = self.held(draw)
        told = f"rank {draw.rank} (" if draw.rank else draw.signal.name
        if (draw.phase, draw.rank) not in DEAF:
            children[0].wait_for(lambda: told in children[0].output)
        (folder / "go").touch()
        codes, output = [child.wait() for child in children], [child.output for child in children]
        assert codes == [75] * draw.n, output
        self.go_on(folder / "run", draw.n)
        return output

    def go_on(self, run: Path, n: int) -> None:
        """Starts a run again; raises unless it comes to the end of the undisturbed one."""
        children = self.start(run, n)
        assert [child.wait() for child in children] == [0] * n, [child.output for child in children]
        assert_equal(run, self.whole(n))


def _named_in(text: str) -> list[tuple[int, int]]:
    """Returns the ranks, with their processes, that the last line calls lost."""
    *_, last = text.splitlines() or [""]
    return [(int(rank), int(pid)) for rank, pid in NAMED.findall(last)]
