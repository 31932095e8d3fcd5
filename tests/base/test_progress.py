"""What shows the progress: bars, lines, functions; and what becomes of those that fail."""

import io
import logging
import os
import pty
import sys
import termios
import threading
import time
import types
from contextlib import suppress

import pytest
from tqdm import tqdm

from sae.base import progress
from sae.base.errors import Stopped
from sae.base.progress import UNWATCHED, doing, during
from sae.base.units import duration


def test_lines_tell_position_pace_and_numbers_at_growing_intervals(caplog):
    now = [0.0]
    shown = progress.Progress("training", 2000, "steps", clock=lambda: now[0])
    with caplog.at_level(logging.INFO):
        for step in range(1, 1001):
            now[0] += 1.0
            shown.update(step, fvu=0.5, valid_share=0.995, tokens_per_s=12345.6)
        now[0] += 1.0
        shown.close()
    figures = "  fvu 0.5  valid 99.5%  tokens_per_s 12,346"
    assert [r.getMessage() for r in caplog.records] == [
        *(
            f"training {n:,}/2,000 steps, 1 steps/s, {duration(2000 - n)} left{figures}"
            for n in (10, 30, 70, 150, 310, 610, 910)
        ),
        f"training 1,000/1,000 steps in 17 min{figures}",
    ]


def test_a_stage_that_is_over_at_once_leaves_no_line(caplog, capsys):
    with caplog.at_level(logging.INFO), progress.Progress("training", 10, "steps") as shown:
        shown.update(10)
    assert not caplog.records
    assert capsys.readouterr().err == ""


@pytest.fixture
def at_once(monkeypatch):
    """Lines and calls as soon as there is something to show."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_CALLS", 0.0)


def test_lines_go_to_standard_error_where_no_log_takes_them(at_once, caplog, capsys):
    shown = progress.Progress("training", 10, "steps")
    shown.update(5, l0=16.0)
    assert not caplog.records
    assert capsys.readouterr().err == "training 5/10 steps  l0 16\n"


@pytest.mark.parametrize(("display", "visible"), [(False, True), (True, False)])
def test_silence_is_none_of_bar_line_and_call(at_once, monkeypatch, caplog, capsys, display, visible):
    monkeypatch.setattr(progress, "watched", lambda: True)
    stage = progress.Watch(display=display).stage("training", 10, "steps", visible=visible)
    with caplog.at_level(logging.INFO), stage as shown:
        shown.update(5)
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_a_function_is_told_where_the_stage_is_and_when_it_ends(at_once):
    told: list[progress.Position] = []
    with progress.Watch(display=told.append).stage("training", 8, "steps", start=2) as shown:
        shown.update(4, fvu=0.5)
        shown.update(5)
    assert [(at.n, at.total, at.figures, at.done) for at in told] == [
        (2, 8, {}, False),
        (4, 8, {"fvu": 0.5}, False),
        (5, 8, {"fvu": 0.5}, False),
        (5, 5, {"fvu": 0.5}, True),
    ]
    assert {at.what for at in told} == {"training"}
    assert [at.seconds_left is None for at in told] == [at.rate is None for at in told] == [True, True, False, False]
    assert told[2].seconds_left == pytest.approx(3 / told[2].rate)


def test_a_function_is_called_ten_times_a_second_at_most():
    told: list[progress.Position] = []
    with progress.Watch(display=told.append).stage("training", 1000, "steps") as shown:
        for step in range(1, 1001):
            shown.update(step)
    assert 2 <= len(told) <= 2 + 10 * told[-1].seconds + 1
    assert told[-1].n == 1000


def test_a_stage_that_fails_is_told_to_be_over_where_it_was(at_once):
    told: list[progress.Position] = []
    stage = progress.Watch(display=told.append).stage("training", 8, "steps", start=3)
    with pytest.raises(Stopped), stage:
        raise Stopped("now")
    assert (told[-1].n, told[-1].total, told[-1].done) == (3, 8, True)


def test_a_function_that_fails_is_warned_of_once_and_asked_no_more(at_once, caplog, capsys):
    calls = []

    def fails(at):
        calls.append(at)
        raise ValueError("no such widget")

    with progress.Watch(display=fails).stage("training", 8, "steps") as shown:
        shown.update(3)
    assert len(calls) == 1
    (record,) = caplog.records
    assert (
        record.getMessage() == "showing the progress failed (ValueError: no such widget); the work goes on without it"
    )


@pytest.mark.parametrize("wrong", [None, "bar", 1, {}])
def test_what_cannot_show_progress_is_a_type_error(wrong):
    with pytest.raises(TypeError, match=r"progress: .* was given; it takes True, False or a function"):
        progress.Watch(display=wrong)


class Bar(tqdm):
    """A bar that keeps what becomes of it."""

    made: list["Bar"]

    def __init__(self, **how):
        super().__init__(file=io.StringIO(), **how)
        Bar.made.append(self)


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(Bar, "made", [], raising=False)
    return Bar.made


def test_a_class_of_bars_is_the_bar_also_where_nobody_watches(bars):
    with progress.Watch(display=Bar).stage("training", 8, "steps") as shown:
        shown.update(8, fvu=0.25)
    (bar,) = bars
    assert (bar.n, bar.total, bar.desc, bar.unit, bar.postfix) == (8, 8, "training", " steps", "fvu 0.25")
    assert bar.disable  # closed


def test_a_bar_tells_figures_that_change_where_it_stands(bars):
    with progress.Watch(display=Bar).stage("scoring", 8, "latents") as shown:
        bars[0].mininterval = 0
        shown.update(3, answers=7)
        shown.update(3, answers=90)
        assert "answers 90" in bars[0].fp.getvalue()


def test_a_bar_within_another_does_not_stay(bars):
    watch = progress.Watch(display=Bar)
    with watch.stage("training", 8, "steps"), watch.stage("evaluating", 8, "passes"):
        pass
    with watch.stage("evaluating", 8, "passes"):
        pass
    assert [(bar.desc, bar.leave) for bar in bars] == [("training", True), ("evaluating", False), ("evaluating", True)]


def test_a_stage_that_ends_short_of_what_was_expected_is_whole(bars):
    with progress.Watch(display=Bar).stage("text", 1000, "tokens") as shown:
        shown.update(990)
    assert (bars[0].n, bars[0].total) == (990, 990)


def test_a_bar_shows_the_pace_of_late_rather_than_its_own(bars):
    now = [0.0]
    shown = progress.Progress("training", 100, "steps", 40, Bar, clock=lambda: now[0])
    for n, now[0] in ((41, 100.0), (42, 102.0), (43, 104.0)):
        shown.update(n, fvu=0.5)
    (bar,) = bars
    assert bar.postfix == f"30 steps/min, {duration(57 * 2)} left, fvu 0.5"
    assert "43/100" in str(bar)
    assert str(bar).endswith(f"{bar.postfix}]")  # tqdm's own rate, with the start-up in it, is nowhere


def test_a_kernel_shows_bars_and_a_shell_without_terminal_does_not(monkeypatch):
    def running(**config):
        return types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(config=config))

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for module, shown in ((running(IPKernelApp={}), True), (running(), False)):
        monkeypatch.setitem(sys.modules, "IPython", module)
        assert progress.watched() == shown


def test_a_terminal_without_columns_gets_lines(monkeypatch):
    master, slave = pty.openpty()
    with os.fdopen(master, "rb"), os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert not progress.watched()
        termios.tcsetwinsize(slave, (24, 80))
        assert progress.watched()


def test_a_watch_stops_when_asked_and_not_before():
    asked = []
    watch = progress.Watch(lambda: bool(asked))
    watch.poll("while waiting")
    asked.append(True)
    with pytest.raises(Stopped, match="while waiting"):
        watch.poll("while waiting")
    progress.UNWATCHED.poll("never")


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
    shown.show.bar.mininterval = 0
    with caplog.at_level(logging.INFO):
        shown.update(1)
        assert "1/10" in terminal.getvalue()
        terminal.gone = True
        for step in range(2, 5):
            time.sleep(0.01)
            shown.update(step, fvu=0.5)
        shown.close()
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("showing the progress failed (BrokenPipeError: ")
    assert [line.split(",")[0] for line in told[1:3]] == [f"training {n}/10 steps" for n in (3, 4)]


@pytest.mark.parametrize("stream", [None, "closed"])
def test_no_standard_error_is_no_error(monkeypatch, stream):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed if stream else None)
    shown = progress.Progress("training", 10, "steps")
    shown.update(1)
    shown.close()


def test_what_a_thread_does_is_told_to_whoever_asks():
    own, other = threading.get_ident(), []

    def beside():
        with during("writing"):
            other.append((doing(threading.get_ident()), doing(own)))

    assert doing(own) == ""
    with UNWATCHED.stage("training", 200, "steps", 118, visible=False) as stage:
        stage.update(119)
        with suppress(ValueError), during("saving"):
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()
            raise ValueError("no luck")
        assert doing(own) == "training at step 119"
    assert other == [("writing", "training at step 119, saving")]
    with UNWATCHED.stage("tokenizing", None, "tokens", 12_000, visible=False):
        assert doing(own) == "tokenizing at 12,000 tokens"
    assert doing(own) == ""
