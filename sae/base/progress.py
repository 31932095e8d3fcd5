"""Progress: a bar in a notebook or on a terminal, a line now and then elsewhere (a Slurm log), or a function.

And how whoever asked for long work watches it.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import ClassVar, TextIO
from weakref import WeakSet

from tqdm import tqdm

from sae.base.arguments import wrong
from sae.base.errors import Stopped
from sae.base.logs import quiet
from sae.base.pace import Pace
from sae.base.units import duration, per_time

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10.0
"""Before the first line. Each one after it takes twice as long, up to the most."""
MOST_BETWEEN_LINES = 300.0
SECONDS_BETWEEN_CALLS = 0.1


@dataclass(frozen=True)
class Position:
    """How far a stage of long work is."""

    what: str
    """The stage: tokenizing, training, evaluating ..."""
    n: int
    """What is done, in `unit`."""
    total: int | None
    """What there is to do; None where nobody knows."""
    unit: str
    """What is counted: tokens, steps, latents ..."""
    seconds: float
    """Since the stage began."""
    seconds_left: float | None
    """At the rate of late; None where nobody knows."""
    figures: dict[str, float] = field(default_factory=dict)
    """A few numbers of the work itself. One whose name ends in `_share` is shown in percent."""
    done: bool = False
    """Whether this is the last that is told of the stage."""
    rate: float | None = None
    """`unit` per second of late, without the start-up and what was there before; None where nobody knows."""

    def __str__(self) -> str:
        whole = f"/{self.total:,}" if self.total else ""
        where = ", ".join([f"{self.what} {self.n:,}{whole} {self.unit}", *self.pace])
        return "  ".join([f"{where} in {duration(self.seconds)}" if self.done else where, *self.told])

    @property
    def pace(self) -> list[str]:
        """Returns how fast it goes and what is left, as far as that is known: "12 steps/s", "45 s left"."""
        rate = [] if self.rate is None or self.done else [per_time(self.rate, self.unit)]
        return rate if self.seconds_left is None or self.done else [*rate, f"{duration(self.seconds_left)} left"]

    @property
    def told(self) -> list[str]:
        """Returns the figures as they are shown: "fvu 0.25", "valid 99.5%"."""
        return [_told(name, value) for name, value in self.figures.items()]


def _told(name: str, value: float) -> str:
    if name.endswith("_share"):
        return f"{name.removesuffix('_share')} {100 * value:.3g}%"
    return f"{name} {value:,.0f}" if abs(value) >= 1000 else f"{name} {value:.4g}"


Display = bool | Callable[[Position], object]
"""How progress is shown, as a caller types it. True: a bar where one can be watched, else a line now and then.
False: not at all. A function is given the `Position`, ten times a second at most, and at the end of each stage; a class
of tqdm's is the bar itself."""


@dataclass(frozen=True)
class Watch:
    """What long work takes from whoever asked for it."""

    should_stop: Callable[[], bool] = lambda: False
    """Polled; once it returns true, the work ends with Stopped."""
    repair: bool = False
    """Whether what is stored is verified, and made again if it is damaged."""
    display: Display = True
    """How the stages of the work are shown."""

    def __post_init__(self) -> None:
        """Raises TypeError for a display that is none."""
        if not isinstance(self.display, bool) and not callable(self.display):
            raise wrong("progress", self.display, "True, False or a function of one argument")

    def poll(self, doing: str) -> None:
        """Raises Stopped, saying during what, when asked to stop."""
        if self.should_stop():
            raise Stopped(doing)

    def stage(
        self, what: str, total: int | None, unit: str, start: int = 0, visible: bool = True, at_once: int = 1
    ) -> "Progress":
        """Returns the progress of one stage, shown as was asked for; to be used as a context.

        `start` is done already, and `at_once` units are worked on side by side.
        """
        return Progress(what, total, unit, start, self.display if visible else False, at_once)


UNWATCHED = Watch()


class Aside:
    """Guards what work can do without, block by block: an error is warned of once, and ends nothing.

    What stops the work (Stopped, Ctrl-C, an exit) passes.
    """

    def __init__(self, what: str, instead: str) -> None:
        self.what, self.instead, self.failed = what, instead, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, Exception) or isinstance(error, Stopped):
            return False
        if not self.failed:
            reason = " ".join(str(error).split())[:200]
            log.warning("%s failed (%s: %s); %s", self.what, type(error).__name__, reason, self.instead)
        self.failed = True
        return True


class Progress:
    """Shows how far a stage is and when it will end, until its context ends.

    What shows it may fail: it is warned of once, and lines take the place of a bar, silence that of a function.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        start: int = 0,
        display: Display = True,
        at_once: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.unit, self.n = what, total, unit, start
        self.figures: dict[str, float] = {}
        self.clock, self.began = clock, clock()
        warming = at_once if not total else min(at_once, (total - start) // 4)
        self.pace = Pace(start, warming)
        self.show, self.instead = _face(display)
        self._show()

    def update(self, n: int, reused: int = 0, **figures: float) -> None:
        """Moves to position n; the figures are shown until there are others.

        `reused` of what is done since the start cost no work (answers were there already), and tells nothing of the
        rate.
        """
        self.n = n
        self.figures |= figures
        self.pace.update(n - reused, self.clock())
        self._show()

    def close(self, ended: bool = True) -> None:
        """Shows the stage for the last time; one that has come to its end is whole, whatever was expected."""
        if ended and self.total:
            self.total = self.n
        self._show(done=True)
        self.show = _silent

    def __enter__(self) -> "Progress":
        self.opened = (get_ident(), self)
        _open.append(self.opened)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        _open.remove(self.opened)
        self.close(ended=error is None)

    def __str__(self) -> str:
        return f"{self.what} at step {self.n}" if self.unit == "steps" else f"{self.what} at {self.n:,} {self.unit}"

    def _show(self, done: bool = False) -> None:
        rate, left = self.pace.rate, None
        if self.total and rate:
            left = max(0, self.total - self.n) / rate
        seconds, figures = self.clock() - self.began, dict(self.figures)
        at = Position(self.what, self.n, self.total, self.unit, seconds, left, figures, done, rate)
        aside = Aside("showing the progress", "the work goes on without it")
        with aside:
            self.show(at)
        if aside.failed:
            self.show, self.instead = self.instead, _silent
            self._show(done)


_open: list[tuple[int, "Progress | str"]] = []
"""The stages that are under way, with the thread of each, the outermost first."""


@contextmanager
def during(what: str) -> Iterator[None]:
    """Says what the block does, to whoever asks by `doing`; for what has no progress to show."""
    opened = (get_ident(), what)
    _open.append(opened)
    try:
        yield
    finally:
        _open.remove(opened)


def doing(thread: int) -> str:
    """Returns what a thread does, "training at step 118, saving", or "" outside of all stages."""
    return ", ".join(str(stage) for opener, stage in tuple(_open) if opener == thread)


Face = Callable[[Position], object]


def _face(display: Display) -> tuple[Face, Face]:
    """Returns what shows a stage, and what takes its place if it fails."""
    if isinstance(display, type) and issubclass(display, tqdm):
        return _Bar(display), _Lines()
    if not isinstance(display, bool):
        return _Calls(display), _silent
    if not display or quiet():
        return _silent, _silent
    if watched():
        from tqdm.auto import tqdm as fitting  # the notebook's, where that can be shown

        return _Bar(fitting), _Lines()
    return _Lines(), _silent


def _silent(_: Position) -> None:
    pass


class _Bar:
    """A bar of tqdm's, with our rate. One within another goes when it is done, so that a run leaves a bar a stage."""

    FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"

    open: ClassVar[WeakSet["_Bar"]] = WeakSet()

    def __init__(self, kind: type[tqdm]) -> None:
        self.kind, self.bar = kind, None

    def __call__(self, at: Position) -> None:
        try:
            if self.bar is None:
                leave = not self.open
                how = {"unit": f" {at.unit}", "leave": leave, "disable": False, "bar_format": self.FORMAT}
                how["miniters"] = 0  # figures may change while the position does not
                self.bar = self.kind(total=at.total, initial=at.n, desc=at.what, **how)
                self.open.add(self)
            self.bar.total = at.total
            self.bar.set_postfix_str(", ".join([*at.pace, *at.told]), refresh=False)
            self.bar.update(at.n - self.bar.n)
            if at.done:
                self.open.discard(self)
                self.bar.close()
        except BaseException:
            self.open.discard(self)
            if self.bar is not None:
                self.bar.disable = True  # so that it does not try again when it is deleted
            raise


class _Lines:
    """A line at growing intervals, in the log where that takes it, else on standard error; after one, one at the end.

    So a short stage says nothing, and a day leaves a page.
    """

    def __init__(self) -> None:
        self.begun, self.told = False, False
        self.wait = self.due = SECONDS_BETWEEN_LINES

    def __call__(self, at: Position) -> None:
        begun, self.begun = self.begun, True
        if not (self.told if at.done else begun and at.seconds >= self.due):
            return
        self.told, self.wait = True, min(2 * self.wait, MOST_BETWEEN_LINES)
        self.due = at.seconds + self.wait
        if log.isEnabledFor(logging.INFO) and log.hasHandlers():
            log.info("%s", at)
        elif sys.stderr is not None:
            sys.stderr.write(f"{at}\n")


class _Calls:
    """Calls of a function."""

    def __init__(self, function: Callable[[Position], object]) -> None:
        self.function, self.last = function, -SECONDS_BETWEEN_CALLS

    def __call__(self, at: Position) -> None:
        if at.done or at.seconds - self.last >= SECONDS_BETWEEN_CALLS:
            self.last = at.seconds
            self.function(at)


def watched() -> bool:
    """Returns whether somebody may watch a bar: on a terminal, or in the notebook whose kernel this is."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None and "IPKernelApp" in shell.config:
        return True
    stream = sys.stderr
    return stream is not None and not stream.closed and stream.isatty() and _has_room(stream)  # it may be a file


def _has_room(terminal: TextIO) -> bool:
    """Whether a terminal has columns: one that no screen belongs to (docker run -t in CI) has 0, and shows no bar."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns > 0
    except (OSError, ValueError):  # it does not say
        return True
