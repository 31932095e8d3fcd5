"""Progress lines away from a terminal, and the trackers' common calls."""

import logging
import sys
import types

import pytest

from sae.base import progress
from sae.base.errors import ConfigError, Stopped
from sae.base.units import duration


def test_lines_tell_position_rest_and_numbers(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Progress("training", 100, "steps")
    with caplog.at_level(logging.INFO):
        for step in range(1, 51):
            now[0] += 1.0
            shown.update(step, fvu=0.5)
    assert [r.getMessage() for r in caplog.records] == [
        f"training {n}/100 steps, {duration(100 - n)} left  fvu 0.5" for n in (10, 20, 30, 40, 50)
    ]


def test_other_ranks_are_silent(monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO):
        progress.Progress("training", 10, "steps", visible=False).update(5)
    assert not caplog.records


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_calls_they_share(monkeypatch, name):
    calls = []
    module = types.ModuleType(name)
    module.init = lambda **settings: calls.append(("init", settings))
    module.log = lambda values, step: calls.append(("log", values, step))
    module.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, module)
    tracker = progress.Tracker(name, "project", "run-1", {"seed": 3})
    tracker.log({"site/fvu": 0.5}, 10)
    tracker.finish()
    assert calls == [
        ("init", {"project": "project", "name": "run-1", "config": {"seed": 3}}),
        ("log", {"site/fvu": 0.5}, 10),
        ("finish",),
    ]


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log\.tracker: wandb is not installed; pip install"):
        progress.Tracker("wandb", "project", "run", {})


def test_no_tracker_by_default():
    tracker = progress.Tracker("none", "project", "run", {})
    tracker.log({"x": 1.0}, 1)
    tracker.finish()


def test_a_watch_stops_when_asked_and_not_before():
    asked = []
    watch = progress.Watch(lambda: bool(asked))
    watch.poll("while waiting")
    asked.append(True)
    with pytest.raises(Stopped, match="while waiting"):
        watch.poll("while waiting")
    progress.UNWATCHED.poll("never")
