"""Rank 0 decides for all: the folder, the config, the checkpoint. What the others see differently does not count."""

import os
from functools import partial

import pytest
from rigs.children import Child, ranks, sae_train
from rigs.fakes import tiny_config
from rigs.runs import assert_equal, checkpoints, lines

from sae.base.settings import to_yaml

CHANGES = {"tokens": 12 * 128}  # a checkpoint after step 5 and at the end


@pytest.fixture
def config_file(tmp_path, tiny_model, tiny_text):
    def write(file, **changes):
        path = tmp_path / file
        path.write_text(to_yaml(tiny_config(tiny_model, tiny_text, CHANGES | changes)), encoding="utf-8")
        return str(path)

    return write


def within(folder, first) -> None:
    os.chdir(folder)
    if first:
        first()


@pytest.fixture
def run(tmp_path):
    """Returns (words of each rank, folder each is in, what is broken at rank 1 first) -> exit codes, what was said."""

    def started(words, folders=None, first=None):
        children = []
        for environment, own in zip(ranks(len(words)), words, strict=True):
            rank = int(environment["RANK"])
            folder = (folders or [tmp_path] * len(words))[rank]
            work = partial(sae_train, own, partial(within, folder, first if rank == 1 else None))
            children.append(Child(tmp_path / "log" / f"{rank}.txt", work, environment))
        return [child.wait() for child in children], "".join(child.output for child in children)

    return started


def sees_no_checkpoint() -> None:
    import sae.training.checkpoint

    sae.training.checkpoint.latest = lambda run_dir: None


def measures_otherwise() -> None:
    import sae.training.preparing

    def wrong(*_):
        raise AssertionError("only rank 0 measures")

    sae.training.preparing.measure = wrong


@pytest.mark.slow
def test_all_go_to_the_folder_that_rank_zero_takes_with_its_config(run, config_file, tmp_path):
    words = [["--config", config_file("config.yaml")], ["--config", config_file("another.yaml", seed=5, name="other")]]
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "metrics.jsonl").touch()  # a run
    codes, output = run(words, first=measures_otherwise)
    assert codes == [0, 0], output
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2"]
    assert len(lines(tmp_path / "runs" / "tiny-2")) == 12
    again, _ = run([["--config", config_file("config.yaml"), "--run-dir", "again"]] * 2)
    assert again == [0, 0]
    assert_equal(tmp_path / "again", tmp_path / "runs" / "tiny-2")  # all of it from rank 0's config


@pytest.mark.slow
def test_all_go_on_from_the_checkpoint_that_rank_zero_finds(run, config_file, tmp_path):
    config = config_file("config.yaml")
    assert run([["--config", config, "--run-dir", "run"]] * 2)[0] == [0, 0]
    assert checkpoints(tmp_path / "run") == [10, 12]
    codes, output = run([["--resume", "run"]] * 2, first=sees_no_checkpoint)
    assert codes == [0, 0], output
    assert "continuing run at step 12 of 12" in output


def soon() -> None:
    import sae.training.start

    sae.training.start.SHARED_WITHIN_S = 0.5


@pytest.mark.parametrize("resume", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_folder_that_one_of_them_does_not_see_is_refused(run, config_file, tmp_path, resume):
    words = ["--config", config_file("config.yaml"), "--run-dir", "run"]
    if resume:
        assert run([words] * 2)[0] == [0, 0]
        words = ["--resume", "run"]
    (tmp_path / "elsewhere").mkdir()
    before = sorted(path.name for path in (tmp_path / "run").rglob("*")) if resume else []
    codes, output = run([words] * 2, [tmp_path, tmp_path / "elsewhere"], soon)
    assert codes == [2, 2], output
    assert "error: run_dir: run is not shared: rank 1 (" in output
    after = sorted(path.name for path in (tmp_path / "run").rglob("*")) if (tmp_path / "run").exists() else []
    assert after == before
