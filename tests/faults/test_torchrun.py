"""Rows 2 and 6 as they happen on a cluster: under torchrun, killed from outside, and stopped through the launcher."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rigs.children import PATIENCE_S, free_port, wait_until
from rigs.fakes import tiny_config
from rigs.runs import assert_equal, checkpoints, lines

from sae.base.settings import to_yaml

CHANGES = {"tokens": 400 * 128, "checkpoints.every_steps": 25, "activations.source": "write_through"}


@pytest.fixture
def torchrun() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts sae-train on two ranks; nothing of it outlives the test."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    started: list[subprocess.Popen] = []

    def start(log: Path, *argv: object, options: tuple[str, ...] = ("--standalone",), **more: Any) -> subprocess.Popen:
        command = [*launcher, *options, "-m", "cli.train", *map(str, argv)]
        with open(log, "w", encoding="utf-8") as file:
            started.append(subprocess.Popen(command, stdout=file, stderr=file, **more))
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


@pytest.fixture
def config(tmp_path, tiny_model, tiny_text):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(tiny_config(tiny_model, tiny_text, CHANGES)), encoding="utf-8")
    return path


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(launcher.pid).children()


def beyond(run: Path, step: int) -> Callable[[], bool]:
    return lambda: (run / "metrics.jsonl").exists() and len(lines(run)) > step


@pytest.mark.slow
def test_restarts_go_on_from_the_checkpoint_in_the_folder_that_nobody_named(torchrun, tmp_path, config):
    log, root = tmp_path / "log.txt", Path(__file__).parents[2]
    again = ("--max-restarts", "2", "--master-port", str(free_port()))  # of a run id that every such torchrun has
    here = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(root)}}
    started = torchrun(log, "--config", config, options=again, **here)
    run = tmp_path / "runs" / "tiny"
    for rank, step in enumerate((40, 150)):
        wait_until(beyond(run, step), lambda: started.poll() is None, log)
        ranks_of(started)[rank].kill()
    assert started.wait(PATIENCE_S) == 0, log.read_text()
    assert log.read_text().count("continuing runs/tiny at step") == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]

    whole = torchrun(log, "--config", config, options=again, **here)  # another torchrun: a run of its own
    assert whole.wait(PATIENCE_S) == 0, log.read_text()
    assert_equal(run, tmp_path / "runs" / "tiny-2")


@pytest.mark.slow
def test_a_run_that_was_stopped_stays_stopped_when_its_ranks_are_started_again(torchrun, tmp_path, config):
    log, run = tmp_path / "log.txt", tmp_path / "run"
    again = ("--max-restarts", "3", "--standalone")
    started = torchrun(log, "--config", config, "--run-dir", run, options=again)
    wait_until(beyond(run, 30), lambda: started.poll() is None, log)
    ranks_of(started)[1].send_signal(signal.SIGUSR1)
    assert started.wait(PATIENCE_S) == 1, log.read_text()  # torchrun's own exit code for any failure
    step = checkpoints(run)[-1]
    said = log.read_text()
    assert f"stopped at step {step} of 400, checkpoint written" in said
    assert said.count("stopped already: a signal had ended") == 3, said
    assert len(lines(run)) == step
    assert torchrun(log, "--resume", run).wait(PATIENCE_S) == 0, log.read_text()
    assert len(lines(run)) == 400
