"""In which folder a run begins, and when it goes on there: alone, again under torchrun, again in a job of Slurm's."""

import json
from dataclasses import replace
from pathlib import Path

import draccus
import pytest

from sae.base.errors import ConfigError, Stopped
from sae.base.settings import to_yaml
from sae.parallel.launch import Launch
from sae.training import start
from sae.training.config import TrainConfig

CONFIG = replace(TrainConfig(), name="mine")
ALONE = Launch()
TORCHRUN = Launch("torchrun", agent="host 17 1.0")
OTHER_TORCHRUN = Launch("torchrun", agent="host 18 9.0")
SLURM = Launch(step="cluster 4711 0")
REQUEUED = replace(SLURM, requeued=True)
OTHER_JOB = Launch(step="cluster 4712 0", requeued=True)
OTHER_STEP = Launch(step="cluster 4711 1", requeued=True)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts a run under a launcher, up to its first step: (launch, folder, resume) -> (folder, whether it goes on)."""
    monkeypatch.chdir(tmp_path)

    def fresh(folder: Path) -> Path:
        return folder.with_name(f"{folder.name}-2") if (folder / "metrics.jsonl").exists() else folder

    def run(found: Launch, run_dir: str | None = None, resume: bool | str = False, config=CONFIG):
        monkeypatch.setattr(start, "launch", lambda: found)
        monkeypatch.setattr(start, "_begun_here", set())  # it is another process
        config, folder, goes_on = start.begin(lambda: config, Path(run_dir) if run_dir else None, resume, fresh)
        if not goes_on:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(config))
            (folder / "env.json").write_text(json.dumps({"job": start.own_jobs()}))
            (folder / "metrics.jsonl").touch()
        return str(folder), goes_on

    return run


@pytest.mark.parametrize(
    ("first", "again", "expected"),
    [
        (ALONE, ALONE, ("runs/mine-2", False)),
        (TORCHRUN, TORCHRUN, ("runs/mine", True)),  # one torchrun starts its ranks again, whatever it counts
        (TORCHRUN, OTHER_TORCHRUN, ("runs/mine-2", False)),
        (SLURM, SLURM, ("runs/mine-2", False)),  # a script may train twice
        (SLURM, REQUEUED, ("runs/mine", True)),
        (SLURM, OTHER_JOB, ("runs/mine-2", False)),
        (SLURM, OTHER_STEP, ("runs/mine-2", False)),
        (replace(SLURM, agent="host 1 1.0"), replace(REQUEUED, agent="host 2 2.0"), ("runs/mine", True)),
    ],
)
def test_a_job_that_is_started_again_goes_on_with_its_own_run(started, first, again, expected):
    assert started(first) == ("runs/mine", False)
    assert started(again) == expected


def test_auto_goes_on_with_what_is_there_and_else_begins(started):
    assert started(ALONE, "there", start.AUTO) == ("there", False)
    assert started(ALONE, "there", start.AUTO) == ("there", True)
    assert started(OTHER_JOB, "there", start.AUTO) == ("there", True)  # the folder is named
    assert started(SLURM, None, start.AUTO) == ("runs/mine", False)
    assert started(SLURM, None, start.AUTO) == ("runs/mine", True)
    assert started(OTHER_JOB, None, start.AUTO) == ("runs/mine-2", False)  # never another job's


@pytest.mark.parametrize(("first", "again"), [(TORCHRUN, TORCHRUN), (SLURM, REQUEUED)])
def test_another_run_of_the_job_whose_name_is_longer_is_not_taken_for_it(started, first, again):
    assert started(first, config=replace(CONFIG, name="mine-wide")) == ("runs/mine-wide", False)
    assert started(again) == ("runs/mine", False)
    assert started(again) == ("runs/mine", True)


def test_a_name_may_hold_what_a_pattern_is_made_of(started):
    config = replace(CONFIG, name="k[64]")
    assert [started(TORCHRUN, config=config) for _ in range(2)] == [("runs/k[64]", False), ("runs/k[64]", True)]


def test_what_this_process_has_begun_it_goes_on_with_only_if_asked(started):
    """A script that trains twice into one folder is told so, under torchrun as anywhere."""
    folder = Path(started(TORCHRUN)[0])
    start.mark(folder, stopped=False)
    assert [start.begin(lambda: CONFIG, folder, resume)[2] for resume in (False, start.AUTO)] == [False, True]


def test_a_folder_that_is_named_and_of_another_job_is_not_taken_over_by_a_restart(started):
    assert started(SLURM, "there") == ("there", False)
    assert started(OTHER_JOB, "there") == ("there", False)  # which the lock then refuses: it holds a run


def test_two_runs_of_one_job_must_be_told_apart_by_name(started):
    started(SLURM)
    started(SLURM)
    with pytest.raises(ConfigError, match="runs/mine, runs/mine-2 are all of this job; name one with --run-dir"):
        started(REQUEUED)
    assert started(REQUEUED, "runs/mine-2") == ("runs/mine-2", True)


@pytest.mark.parametrize("resume", [False, start.AUTO, True])
def test_a_run_that_a_signal_has_ended_is_not_begun_anew_by_the_same_torchrun(started, resume):
    folder, _ = started(TORCHRUN)
    start.mark(Path(folder), stopped=True)
    with pytest.raises(Stopped, match="already: a signal had ended runs/mine"):
        started(TORCHRUN, folder if resume is True else None, resume)
    assert started(OTHER_TORCHRUN, folder, start.AUTO) == (folder, True)
    start.mark(Path(folder), stopped=False)
    assert started(TORCHRUN, None, resume) == (folder, True)


def test_one_that_was_ended_before_anything_was_written_stays_ended_too(started, monkeypatch):
    monkeypatch.setattr(start, "launch", lambda: TORCHRUN)
    Path("runs/mine").mkdir(parents=True)
    start.mark(Path("runs/mine"), stopped=True)
    with pytest.raises(Stopped, match="already"):
        started(TORCHRUN)


def test_a_run_of_slurm_that_was_stopped_goes_on_when_it_is_requeued(started):
    folder, _ = started(SLURM)
    start.mark(Path(folder), stopped=True)
    assert started(REQUEUED) == (folder, True)


def test_other_settings_are_refused_by_name(started):
    started(ALONE, "there")
    with pytest.raises(ConfigError, match="--resume: batch_tokens cannot change"):
        started(ALONE, "there", start.AUTO, replace(CONFIG, batch_tokens=2048))


def test_who_began_a_run_is_told_without_naming_a_host(monkeypatch):
    monkeypatch.setattr(start, "launch", lambda: replace(TORCHRUN, step="cluster 4711 0"))
    told = start.own_jobs()
    assert sorted(told) == ["agent", "step"]
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in told.values())
    assert draccus.encode(told) == told
