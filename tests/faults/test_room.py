"""A disk that is too small: known before the run, and at each checkpoint while the ones before it are still there."""

import contextlib
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from rigs.interp_runs import tiny_coder
from rigs.runs import assert_equal, checkpoints, error_of, files

import sae.stream.sources
import sae.training.saving
from cli.explain import main as sae_explain
from sae.base.files import cache_dir, verify
from sae.training.saving import Saver


@pytest.fixture
def room(monkeypatch):
    """Returns what sets how many bytes are free on every disk."""
    found = {"free": 10**12}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(**found))
    return lambda free: found.update(free=free)


def before_saving(monkeypatch, step, act):
    """Has `act` done when the checkpoint of a step is about to be written, and the one before is whole."""
    original = Saver.save

    def save(self, number, *args, **how):
        if number == step:
            self.wait()
            act()
        return original(self, number, *args, **how)

    monkeypatch.setattr(Saver, "save", save)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_made_of_its_text(tmp_path, tiny_train, room):
    run = tmp_path / "run"
    room(1000)
    code, printed = tiny_train(folder=run)
    assert code == 2
    assert error_of(printed).startswith("run_dir: ")
    assert f"of disk are needed, 1 kB are free at {run}; make room, or choose another folder" in error_of(printed)
    assert files(run) == set()
    assert not (cache_dir() / "tokens").exists()


def test_what_lies_in_the_folder_already_needs_no_more_room(tmp_path, tiny_train, room):
    run = tmp_path / "run"
    assert tiny_train(folder=run)[0] == 0
    kept = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    room(kept)  # half as much again as what is kept would be needed, were it not there
    code, printed = tiny_train(options=("--resume", run))
    assert code == 0, printed


@pytest.mark.parametrize(("free", "kept"), [pytest.param("before", [5], marks=pytest.mark.slow), ("after", [5, 10])])
def test_a_disk_that_fills_up_loses_no_checkpoint_and_the_run_goes_on(
    tmp_path, monkeypatch, tiny_train, room, free, kept
):
    """It fills up before the second checkpoint, or with it."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        if free == "before":
            before_saving(patch, 10, lambda: room(100))
        else:
            original = sae.training.saving.publish

            def publish(folder, known):
                if folder.name == "step-000000010":
                    room(100)
                return original(folder, known)

            patch.setattr(sae.training.saving, "publish", publish)
        code, printed = tiny_train(folder=run)
    assert code == 1
    what = "checkpoint step-000000010" if free == "before" else "the checkpoint that follows step-000000010"
    assert f"no room for {what}: " in error_of(printed)
    assert error_of(printed).endswith(f"; once there is room, continue with --resume {run}")
    assert checkpoints(run) == kept
    for step in (run / "checkpoints").glob("step-*"):
        verify(step)
    room(10**12)
    code, printed = tiny_train(options=("--resume", run))
    assert code == 0, printed
    assert tiny_train(folder=tmp_path / "undisturbed")[0] == 0
    assert_equal(run, tmp_path / "undisturbed")


def test_the_oldest_checkpoint_is_there_until_the_new_one_is_whole(tmp_path, monkeypatch, tiny_train):
    run, seen = tmp_path / "run", []
    original = sae.training.saving.publish
    monkeypatch.setattr(sae.training.saving, "publish", lambda *args: seen.append(checkpoints(run)) or original(*args))
    assert tiny_train(folder=run)[0] == 0
    assert seen == [[], [5], [5, 10], [10, 15]]


def test_stored_activations_are_measured_by_their_first_block(tmp_path, tiny_train, room, monkeypatch):
    original = sae.stream.sources.ShardWriter.write

    def write(self, index, tensors):
        if self.folder.parent.name == "activations":
            room(3000)
        return original(self, index, tensors)

    monkeypatch.setattr("sae.stream.sources.ShardWriter.write", write)
    code, printed = tiny_train({"activations.source": "disk"}, folder=tmp_path / "run")
    assert code == 2
    assert error_of(printed).startswith("SAE_CACHE: ")
    assert len(list((cache_dir() / "activations").rglob("shard-*.safetensors"))) == 1


def test_so_are_stored_codes(tmp_path, room, capsys):
    coder = tiny_coder(tmp_path / "made", documents=20)
    room(3000)
    options = [
        "--evidence.tokens",
        "12000",
        "--latents",
        "all",
        "--evidence.store",
        "true",
        "--run-dir",
        str(tmp_path / "explain"),
    ]
    assert sae_explain([str(coder), *options]) == 2
    error = error_of(capsys.readouterr().err)
    assert error.startswith("run_dir: ")
    assert "of disk are needed, 3 kB are free at " in error


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_others_fill_up(tmp_path, monkeypatch, tiny_train, small_disk):
    run, filler = small_disk / "run", small_disk / "filler"

    def fill():
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    with monkeypatch.context() as patch:
        before_saving(patch, 10, fill)
        code, printed = tiny_train(folder=run)
    assert code == 1
    assert "[Errno 28] no room for checkpoint step-000000010: " in error_of(printed)
    assert error_of(printed).endswith(f"; once there is room, continue with --resume {run}")
    assert checkpoints(run) == [5]
    filler.unlink()
    code, printed = tiny_train(options=("--resume", run))
    assert code == 0, printed
    assert tiny_train(folder=tmp_path / "undisturbed")[0] == 0
    assert_equal(run, tmp_path / "undisturbed")


def test_a_run_too_large_for_its_disk_leaves_the_disk_empty(tiny_train, small_disk):
    code, printed = tiny_train({"coder.d_sae": 40_000}, folder=small_disk / "run")
    assert code == 2
    assert error_of(printed).startswith("run_dir: ")
    assert f"are free at {small_disk}" in error_of(printed)
    assert files(small_disk) == set()
