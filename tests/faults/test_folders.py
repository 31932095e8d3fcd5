"""Rows 13 and 14: where a run lies: held by another, full of another, not to be written, with odd names."""

import shutil
import time
from functools import partial
from pathlib import Path

import pytest
from rigs.children import Child
from rigs.runs import error_of, files

from cli.evaluate import main as sae_eval
from sae.base.files import FolderLock

# Row 13


def hold(folder: Path) -> int:
    with FolderLock(folder):
        while True:
            time.sleep(3600)


@pytest.mark.slow
def test_a_second_run_in_a_folder_fails_at_once_and_a_killed_one_frees_it(tmp_path, tiny_train, monkeypatch):
    run = tmp_path / "run"
    child = Child(tmp_path / "log.txt", partial(hold, run))
    child.wait_for(lambda: (run / ".lock").exists() and (run / ".lock").read_text().endswith("}"))
    with monkeypatch.context() as patch:
        patch.setattr("sae.training.preparing.load_language_model", lambda **_: pytest.fail("the model was loaded"))
        code, printed = tiny_train(folder=run)
    assert code == 2
    assert error_of(printed).startswith(f"run_dir: {run} is in use by process {child.process.pid} (started ")
    child.kill()
    child.wait()
    code, printed = tiny_train(folder=run)
    assert code == 0, printed


def test_a_new_run_does_not_overwrite_one(tmp_path, tiny_train):
    run = tmp_path / "run"
    assert tiny_train({"tokens": 256}, folder=run)[0] == 0
    before = {name: (run / name).read_bytes() for name in files(run) if name != ".lock"}
    code, printed = tiny_train({"tokens": 512}, folder=run)
    assert code == 2
    assert error_of(printed) == f"run_dir: {run} holds a run; continue it with --resume {run}, or name another"
    assert {name: (run / name).read_bytes() for name in files(run) if name != ".lock"} == before


# Row 14: root may write anywhere, so a file in a folder's place and the kernel's own /sys stand in for read-only ones


@pytest.mark.parametrize("place", ["file", "/sys/sae-interp"])
@pytest.mark.parametrize("what", ["run_dir", "SAE_CACHE"])
def test_a_folder_that_cannot_be_written_is_known_before_the_model_is_loaded(
    tmp_path, monkeypatch, tiny_train, no_model, what, place
):
    (tmp_path / "file").write_text("x")
    folder = tmp_path / place / "below"
    if what == "SAE_CACHE":
        monkeypatch.setenv("SAE_CACHE", str(folder))
        code, printed = tiny_train()
    else:
        code, printed = tiny_train(folder=folder)
    assert code == 2
    assert error_of(printed).startswith(f"{what}: cannot write to {folder}: ")
    assert error_of(printed).endswith("; choose another folder")


@pytest.mark.slow
def test_missing_folders_are_made_and_names_may_hold_spaces_and_unicode(
    tmp_path, monkeypatch, tiny_train, tiny_model, tiny_text, capsys
):
    odd = tmp_path / "new folder" / "ünï 文, #1"
    monkeypatch.setenv("SAE_CACHE", str(odd / "cache"))
    model, text = shutil.copytree(tiny_model, odd / "the model"), shutil.copytree(tiny_text, odd / "the text")
    run = odd / "runs" / "a run"
    changes = {"activations.source": "disk", "grid": {"coder.selection.k": [2, 4]}}
    code, printed = tiny_train(changes, folder=run, model=model, text=text)
    assert code == 0, printed
    assert (run / "evaluation.json").exists()
    assert tiny_train(options=("--resume", run))[0] == 0
    assert sae_eval([str(run), "--tokens", "64"]) == 0
