"""The trackers' common calls, and what becomes of those that fail."""

import re
import sys
import threading
import types

import pytest

from sae.base import tracker as trackers
from sae.base.errors import ConfigError


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_calls_they_share(monkeypatch, name):
    calls = []
    module = types.ModuleType(name)
    module.init = lambda **settings: calls.append(("init", settings))
    module.log = lambda values, step: calls.append(("log", values, step))
    module.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, module)
    tracker = trackers.Tracker(name, "project", "run-1", {"seed": 3})
    tracker.log({"site/fvu": 0.5}, 10)
    tracker.finish()
    assert calls == [
        ("init", {"project": "project", "name": "run-1", "config": {"seed": 3}}),
        ("log", {"site/fvu": 0.5}, 10),
        ("finish",),
    ]


def test_a_tracker_that_lacks_a_package_of_its_own_says_which(monkeypatch, tmp_path):
    (tmp_path / "trackio.py").write_text("import package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ConfigError, match=r"trackio cannot begin \(No module named 'package_that_is_not_there'\)"):
        trackers.Tracker("trackio", "project", "run", {})


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log\.tracker: wandb is not installed; pip install"):
        trackers.Tracker("wandb", "project", "run", {})


def test_no_tracker_by_default():
    tracker = trackers.Tracker("none", "project", "run", {})
    tracker.log({"x": 1.0}, 1)
    tracker.finish()


def tracker_module(monkeypatch, **calls):
    module = types.ModuleType("wandb")
    for name in ("init", "log", "finish"):
        setattr(module, name, calls.get(name, lambda *_args, **_settings: None))
    monkeypatch.setitem(sys.modules, "wandb", module)


def fails(error):
    def call(*_args, **_settings):
        raise error

    return call


@pytest.mark.parametrize("error", [RuntimeError("no\ndisk"), BrokenPipeError(32, "Broken pipe"), ValueError()])
def test_errors_of_a_tracker_are_warned_of_once_and_end_nothing(monkeypatch, caplog, error):
    tracker_module(monkeypatch, log=fails(error), finish=fails(error))
    tracker = trackers.Tracker("wandb", "project", "run", {})
    for step in range(3):
        tracker.log({"x": 1.0}, step)
    tracker.finish()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"log.tracker: wandb failed ({type(error).__name__}: ")
    assert record.getMessage().endswith("the run goes on, its figures are in metrics.jsonl")
    assert "\n" not in record.getMessage()


def test_a_tracker_that_hangs_holds_up_neither_the_run_nor_its_end(monkeypatch, caplog):
    for_ever = threading.Event()
    tracker_module(monkeypatch, log=lambda *_args, **_settings: for_ever.wait())
    monkeypatch.setattr(trackers, "FINISH_S", 0.05)
    monkeypatch.setattr(trackers, "CALLS_WAITING", 3)
    tracker = trackers.Tracker("wandb", "project", "run", {})
    for step in range(100):
        tracker.log({"x": 1.0}, step)
    tracker.finish()
    for_ever.set()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("error", [RuntimeError("api_key not configured (no-tty)"), TimeoutError()])
def test_a_tracker_that_cannot_begin_is_refused_in_one_line(monkeypatch, error):
    tracker_module(monkeypatch, init=fails(error))
    reason = str(error) or "TimeoutError"
    with pytest.raises(ConfigError, match=re.escape(f"log.tracker: wandb cannot begin ({reason}); ")):
        trackers.Tracker("wandb", "project", "run", {})


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_ends_a_process_is_not_held_back(monkeypatch, error):
    tracker_module(monkeypatch, log=fails(error))
    tracker = trackers.Tracker("wandb", "project", "run", {})
    tracker.log({"x": 1.0}, 0)
    with pytest.raises(type(error)):
        tracker.finish()
