"""Progress lines away from a terminal, and the trackers' common calls."""

import io
import logging
import re
import sys
import threading
import time
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


def test_a_tracker_that_lacks_a_package_of_its_own_says_which(monkeypatch, tmp_path):
    (tmp_path / "trackio.py").write_text("import package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ConfigError, match=r"trackio cannot begin \(No module named 'package_that_is_not_there'\)"):
        progress.Tracker("trackio", "project", "run", {})


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
    tracker = progress.Tracker("wandb", "project", "run", {})
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
    monkeypatch.setattr(progress, "FINISH_S", 0.05)
    monkeypatch.setattr(progress, "CALLS_WAITING", 3)
    tracker = progress.Tracker("wandb", "project", "run", {})
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
        progress.Tracker("wandb", "project", "run", {})


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_ends_a_process_is_not_held_back(monkeypatch, error):
    tracker_module(monkeypatch, log=fails(error))
    tracker = progress.Tracker("wandb", "project", "run", {})
    tracker.log({"x": 1.0}, 0)
    with pytest.raises(type(error)):
        tracker.finish()


def test_what_stops_the_work_passes_what_is_done_beside_it(caplog):
    for error in (Stopped("at step 3"), KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(error)), progress.Aside("this", "so what"):
            raise error
    assert not caplog.records


def test_a_terminal_that_goes_away_leaves_lines_in_the_place_of_a_bar(monkeypatch, caplog):
    class Terminal(io.StringIO):
        gone = False

        def isatty(self):
            return True

        def write(self, text):
            if self.gone:
                raise BrokenPipeError(32, "Broken pipe")
            return super().write(text)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    shown = progress.Progress("training", 10, "steps")
    shown.bar.mininterval = 0
    with caplog.at_level(logging.INFO):
        shown.update(1)
        assert "1/10" in terminal.getvalue()
        terminal.gone = True
        for step in range(2, 5):
            time.sleep(0.01)
            shown.update(step, fvu=0.5)
        shown.close()
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("the progress bar failed (BrokenPipeError: ")
    assert [line.split(",")[0] for line in told[1:]] == [f"training {n}/10 steps" for n in (2, 3, 4)]


@pytest.mark.parametrize("stream", [None, "closed"])
def test_no_standard_error_is_no_error(monkeypatch, stream):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed if stream else None)
    shown = progress.Progress("training", 10, "steps")
    shown.update(1)
    shown.close()
