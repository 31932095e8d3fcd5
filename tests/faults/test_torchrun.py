"""Rows 2 and 6 as they happen on a cluster: under torchrun, killed from outside, and stopped through the launcher."""

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from rigs.children import PATIENCE_S, wait_until
from rigs.fakes import tiny_config
from rigs.runs import assert_equal, checkpoints, lines

from sae.base.settings import to_yaml

CHANGES = {"tokens": 400 * 128, "checkpoints.every_steps": 25, "activations.source": "write_through"}


@pytest.fixture
def torchrun() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts sae-train on two ranks; nothing of it outlives the test."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    started: list[subprocess.Popen] = []

    def start(log: Path, *argv: object) -> subprocess.Popen:
        with open(log, "w", encoding="utf-8") as file:
            started.append(subprocess.Popen([*launcher, "cli.train", *map(str, argv)], stdout=file, stderr=file))
        return started[-1]

    yield start
    for process in started:
        kill(process)


def kill(launcher: subprocess.Popen) -> None:
    """Kills the launcher and every rank, as a node that is lost does."""
    if launcher.poll() is None:
        for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
            process.kill()
    launcher.wait(PATIENCE_S)


@pytest.mark.slow
def test_killed_and_stopped_under_torchrun_equals_undisturbed(torchrun, tmp_path, tiny_model, tiny_text):
    config, log = tmp_path / "config.yaml", tmp_path / "log.txt"
    config.write_text(to_yaml(tiny_config(tiny_model, tiny_text, CHANGES)), encoding="utf-8")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert torchrun(log, "--config", config, "--run-dir", whole).wait(PATIENCE_S) == 0, log.read_text()

    def beyond(step: int) -> Callable[[], bool]:
        return lambda: (run / "metrics.jsonl").exists() and len(lines(run)) > step

    draw = random.Random(0)
    killed = torchrun(log, "--config", config, "--run-dir", run)
    wait_until(beyond(draw.randrange(30, 100)), lambda: killed.poll() is None, log)
    kill(killed)
    assert checkpoints(run)

    stopped = torchrun(log, "--resume", run)
    wait_until(beyond(draw.randrange(150, 300)), lambda: stopped.poll() is None, log)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(PATIENCE_S) != 0
    step = checkpoints(run)[-1]
    assert f"stopped at step {step} of 400, checkpoint written; continue with --resume {run}" in log.read_text()
    assert len(lines(run)) == step

    assert torchrun(log, "--resume", run).wait(PATIENCE_S) == 0, log.read_text()
    assert_equal(run, whole)
