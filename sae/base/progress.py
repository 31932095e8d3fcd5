"""Progress: a bar in a notebook or on a terminal, a line every few seconds elsewhere (a Slurm log), or a function.

And how whoever asked for long work watches it.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import ClassVar
from weakref import WeakSet

from tqdm import tqdm

from sae.base.arguments import wrong
from sae.base.errors import Stopped
from sae.base.logs import quiet
from sae.base.units import duration

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10.0
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
    """At the pace so far; None where nobody knows."""
    figures: dict[str, float] = field(default_factory=dict)
    """A few numbers of the work itself."""
    done: bool = False
    """Whether this is the last that is told of the stage."""

    def __str__(self) -> str:
        whole = f"/{self.total:,}" if self.total else ""
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return f"{self.what} {self.n:,}{whole} {self.unit}{left}" + "".join(
            f"  {name} {value:.4g}" for name, value in self.figures.items()
        )


Display = bool | Callable[[Position], object]
"""How progress is shown, as a caller types it. True: a bar where one can be watched, else a line every few seconds.
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

    def stage(self, what: str, total: int | None, unit: str, start: int = 0, visible: bool = True) -> "Progress":
        """Returns the progress of one stage, shown as was asked for; to be used as a context."""
        return Progress(what, total, unit, start, self.display if visible else False)


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

    def __init__(self, what: str, total: int | None, unit: str, start: int = 0, display: Display = True) -> None:
        self.what, self.total, self.unit, self.first, self.n = what, total, unit, start, start
        self.figures: dict[str, float] = {}
        self.began = time.monotonic()
        self.show, self.instead = _face(display)
        self._show()

    def update(self, n: int, **figures: float) -> None:
        """Moves to position n; the figures are shown until there are others."""
        self.n = n
        self.figures |= figures
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
        seconds, left = time.monotonic() - self.began, None
        if self.total and self.n > self.first:
            left = seconds / (self.n - self.first) * max(0, self.total - self.n)
        aside = Aside("showing the progress", "the work goes on without it")
        with aside:
            self.show(Position(self.what, self.n, self.total, self.unit, seconds, left, dict(self.figures), done))
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
    """A bar of tqdm's. One within another goes when it is done, so that a run leaves a bar a stage."""

    open: ClassVar[WeakSet["_Bar"]] = WeakSet()

    def __init__(self, kind: type[tqdm]) -> None:
        self.kind, self.bar = kind, None

    def __call__(self, at: Position) -> None:
        try:
            if self.bar is None:
                leave = not self.open
                self.bar = self.kind(
                    total=at.total, initial=at.n, desc=at.what, unit=f" {at.unit}", leave=leave, disable=False
                )
                self.open.add(self)
            self.bar.total = at.total
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in at.figures.items()}, refresh=False)
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
    """A line every few seconds: in the log where that takes it, else on standard error."""

    def __init__(self) -> None:
        self.last: float | None = None

    def __call__(self, at: Position) -> None:
        now, last = time.monotonic(), self.last
        if last is not None and (at.done or now - last < SECONDS_BETWEEN_LINES):
            return
        self.last = now
        if last is None:  # where it begins
            return
        if log.isEnabledFor(logging.INFO) and log.hasHandlers():
            log.info("%s", at)
        elif sys.stderr is not None:
            sys.stderr.write(f"{at}\n")


class _Calls:
    """Calls of a function."""

    def __init__(self, function: Callable[[Position], object]) -> None:
        self.function, self.last = function, -SECONDS_BETWEEN_CALLS

    def __call__(self, at: Position) -> None:
        now = time.monotonic()
        if at.done or now - self.last >= SECONDS_BETWEEN_CALLS:
            self.last = now
            self.function(at)


def watched() -> bool:
    """Returns whether somebody may watch a bar: on a terminal, or in the notebook whose kernel this is."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None and "IPKernelApp" in shell.config:
        return True
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()  # it may be a file, or closed
