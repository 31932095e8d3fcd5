"""Ctrl-C and SIGTERM before there is anything to keep: a line that says so, at whatever moment, in every command."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from rigs.children import Child
from rigs.children import ranks as as_ranks
from rigs.fakes import tiny_config
from rigs.interp_runs import tiny_coder

from sae.base.settings import to_yaml

AT_IMPORT = """
import os, signal, sys

class Asked:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("INTERRUPT_AT"):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), getattr(signal, os.environ["INTERRUPT_BY"]))

sys.meta_path.insert(0, Asked())
"""
COMMANDS = {  # with moments: modules that are imported then
    "train": (["--config", "{config}", "--run-dir", "{folder}/run"], ("draccus", "torch", "sae.training.run")),
    "evaluate": (["{coder}"], ("draccus", "torch", "transformers")),
    "load": (["show", "{coder}"], ("draccus", "torch")),
    "explain": (["{coder}", "--run-dir", "{folder}/explain"], ("draccus", "torch")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tiny_coder(folder, documents=5)
    config = tiny_config(folder / "model", folder / "text")
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(AT_IMPORT)
    return folder


MOMENTS = [
    *((command, moment, "SIGINT") for command, (_, moments) in COMMANDS.items() for moment in moments),
    ("train", "draccus", "SIGTERM"),
    ("train", "torch", "SIGTERM"),
]
QUICK = [("train", "torch", "SIGTERM"), ("explain", "draccus", "SIGINT")]  # each begins a Python of its own


@pytest.mark.parametrize(
    ("command", "moment", "name"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MOMENTS if case not in QUICK)],
)
def test_a_signal_while_code_is_loaded_is_one_line_and_leaves_nothing(tmp_path, made, command, moment, name):
    words, _ = COMMANDS[command]
    argv = [word.format(config=made / "config.yaml", coder=made / "coder", folder=tmp_path) for word in words]
    path = f"{made / 'site'}{os.pathsep}{os.environ['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-m", f"cli.{command}", *argv],
        env={**os.environ, "PYTHONPATH": path, "INTERRUPT_AT": moment, "INTERRUPT_BY": name},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 128 + getattr(signal, name), done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"stopped by {name}; no file is left half written")
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_scheduler_that_asks_for_a_checkpoint_that_early_gets_its_exit_code(tmp_path, made, n_ranks):
    run, site = tmp_path / "run", f"{made / 'site'}{os.pathsep}{os.environ['PYTHONPATH']}"
    started = []
    for environment in reversed(as_ranks(n_ranks) if n_ranks > 1 else [{}]):
        signaled = {"INTERRUPT_AT": "torch", "INTERRUPT_BY": "SIGUSR1"} if environment.get("RANK", "1") == "1" else {}
        argv = [sys.executable, "-m", "cli.train", "--config", str(made / "config.yaml"), "--run-dir", str(run)]
        told = {**os.environ, **environment, **signaled, "PYTHONPATH": site}
        started.append(subprocess.Popen(argv, env=told, stderr=subprocess.PIPE, text=True))
        time.sleep(6 * (n_ranks - 1))  # of several, the one that is asked comes first, and must wait to tell the other
    said = [process.communicate(timeout=100)[1] for process in started]
    assert [process.returncode for process in started] == [75] * n_ranks, said
    assert all("continue with --resume" in one or "stopped while the ranks met" in one for one in said)
    assert not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text()


def interrupted(command: str, argv: list[str], number: int) -> int:
    """A command that gets a signal as the language model is loaded."""
    import importlib

    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained

    def load(*args, **kwargs):
        signal.raise_signal(number)
        return original(*args, **kwargs)

    AutoTokenizer.from_pretrained = load
    return importlib.import_module(f"cli.{command}").main(argv)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_signal_while_the_model_is_loaded_ends_it_there_and_then(tmp_path, made, command, number):
    words, _ = COMMANDS[command]
    argv = [word.format(config=made / "config.yaml", coder=made / "coder", folder=tmp_path) for word in words]
    child = Child(tmp_path / "log.txt", partial(interrupted, command, argv, number))
    assert child.wait() == 128 + number, child.output
    assert child.output.splitlines()[-1].startswith(f"stopped by {number.name}; ")
    assert not list(tmp_path.glob("run/*.yaml"))


def test_where_it_takes_until_the_next_stop_it_is_said_at_once(tmp_path, made):
    words, _ = COMMANDS["explain"]
    argv = [word.format(coder=made / "coder", folder=tmp_path) for word in words]
    child = Child(tmp_path / "log.txt", partial(interrupted, "explain", argv, signal.SIGINT))
    assert child.wait() == 75, child.output
    said = [line for line in child.output.splitlines() if "SIGINT" in line]
    assert said == ["SIGINT: stopping as soon as can be; another one ends it at once"]
    assert child.output.splitlines()[-1].startswith("stopped ")
