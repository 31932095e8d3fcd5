"""Rows 1, 2, 6 and 10 while a checkpoint is being written in the background: nothing is lost, and the rank is named."""

import errno
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from rigs.children import Child, die, ranks, sae_train
from rigs.fakes import tiny_config
from rigs.runs import assert_equal, checkpoints, lines

import sae.base.files
import sae.training.saving
from sae.base.files import verify
from sae.base.settings import to_yaml
from sae.training.saving import Saver

TENTH = "step-000000010"


@pytest.fixture
def config(tmp_path, tiny_model, tiny_text):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(tiny_config(tiny_model, tiny_text, {"ranks.deadline_s": 5.0})), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, tiny_text):
    """The folder of a run of two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.yaml").write_text(to_yaml(tiny_config(tiny_model, tiny_text)), encoding="utf-8")
    assert finished(start(folder, "--config", folder / "config.yaml", "--run-dir", folder / "run")) == [0, 0]
    return folder / "run"


def start(folder: Path, *argv: object, first=None) -> list[Child]:
    work = partial(sae_train, [str(word) for word in argv], first)
    return [Child(folder / "logs" / f"{env['RANK']}.txt", work, env) for env in ranks(2)]


def finished(children: list[Child]) -> list[int]:
    return [child.wait() for child in children]


def disturb(rank: int, point: str, act) -> None:
    """Has a rank `act` when the writing of the tenth step's checkpoint has come to a point."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    module, name = {
        "a file": (sae.training.saving, "write_tensors"),
        "the manifest": (sae.base.files, "_seal"),
        "the rename": (os, "rename"),
        "the oldest": (sae.training.saving, "complete"),
    }[point]
    original = getattr(module, name)

    def hit(*args, **how):
        last = point == "the oldest" and (args[0] / "checkpoints" / TENTH).exists()
        if last or TENTH in str(args[0]):
            if point == "a file":
                args[0].write_bytes(b"half of it")
            act()
        return original(*args, **how)

    setattr(module, name, hit)


DEATHS = [(1, "a file"), (0, "a file"), (0, "the manifest"), (0, "the rename"), (0, "the oldest")]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "point"), DEATHS)
def test_a_rank_killed_while_writing_is_named_and_the_run_goes_on(tmp_path, config, whole, rank, point):
    run = tmp_path / "run"
    children = start(tmp_path, "--config", config, "--run-dir", run, first=partial(disturb, rank, point, die))
    codes = finished(children)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    assert f"rank {rank} (" in children[1 - rank].output
    assert checkpoints(run) == ([5, 10] if point == "the oldest" else [5])
    for step in (run / "checkpoints").glob("step-*"):
        verify(step)
    children = start(tmp_path, "--resume", run)
    assert finished(children) == [0, 0], [child.output for child in children]
    assert_equal(run, whole)
    assert all(path.name.startswith("step-") for path in (run / "checkpoints").iterdir())


def test_a_checkpoint_of_two_ranks_goes_on_alone(tmp_path, whole, tiny_train):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-000000020")
    for path in (run / "evaluation.json", run / "coders"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    code, printed = tiny_train(options=("--resume", run))
    assert code == 0, printed
    assert "at step 15 of 20" in printed
    assert sorted(path.name for path in (run / "checkpoints" / "step-000000020").glob("*.safetensors")) == [
        "coder-0.safetensors",
        "stream.safetensors",
    ]
    for one, two in zip(lines(run), lines(whole), strict=True):
        if one["step"] <= 15:
            assert one == two
        elif "fvu" in one:
            assert one["tokens"] == two["tokens"]
            assert one["fvu"] == pytest.approx(two["fvu"], rel=1e-4)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
def test_one_rank_without_room_ends_all_with_one_line(tmp_path, config, whole):
    run = tmp_path / "run"
    children = start(tmp_path, "--config", config, "--run-dir", run, first=partial(disturb, 1, "a file", full))
    assert finished(children) == [1, 1], [child.output for child in children]
    error = children[0].output.splitlines()[-1]
    assert error.startswith(f"error: [Errno {errno.ENOSPC}] rank 1 (")
    assert f", pid {children[1].process.pid}): cannot write {run}/checkpoints/{TENTH}/coder-0.part-00002" in error
    assert error.endswith(f"No space left on device; once there is room, continue with --resume {run}")
    assert "No space left" not in children[1].output
    assert checkpoints(run) == [5]
    children = start(tmp_path, "--resume", run)
    assert finished(children) == [0, 0], [child.output for child in children]
    assert_equal(run, whole)


def no_memory(rank: int, method: str) -> None:
    def fails(self, own) -> None:
        raise MemoryError("no memory for the copy")

    if int(os.environ.get("RANK", "0")) == rank:
        setattr(sae.training.saving.Copy, method, fails)


@pytest.mark.parametrize(
    ("rank", "method"),
    [(1, "make_room"), *(pytest.param(r, "take", marks=pytest.mark.slow) for r in (0, 1))],
)
def test_one_rank_without_memory_for_the_copy_ends_all(tmp_path, config, rank, method):
    run = tmp_path / "run"
    children = start(tmp_path, "--config", config, "--run-dir", run, first=partial(no_memory, rank, method))
    assert finished(children) == [1, 1], [child.output for child in children]
    assert "no memory for the copy" in "".join(child.output for child in children)
    assert "connection" not in children[1].output


def test_a_signal_while_writing_is_heard_and_what_was_begun_is_whole(tmp_path, monkeypatch, tiny_train):
    run, waiting, asked = tmp_path / "run", [], []
    files, wait = sae.training.saving._files, Saver.wait

    def slow(draft, own):
        if "step-000000005" in draft.name and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
            while not waiting:
                time.sleep(0.001)
        return files(draft, own)

    def waited(self):
        waiting.extend(asked)
        wait(self)

    with monkeypatch.context() as patch:
        patch.setattr(sae.training.saving, "_files", slow)
        patch.setattr(Saver, "wait", waited)
        code, printed = tiny_train(folder=run)
    assert code == 75
    found = checkpoints(run)  # one, if it was heard before the next step
    first, last = found[0], found[-1]
    assert (first, last < 20) == (5, True)
    assert f"stopped at step {last} of 20, checkpoint written" in printed
    code, printed = tiny_train(options=("--resume", run))
    assert code == 0, printed
    assert tiny_train(folder=tmp_path / "undisturbed")[0] == 0
    assert_equal(run, tmp_path / "undisturbed")
