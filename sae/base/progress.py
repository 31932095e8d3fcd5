"""Progress: a bar on a terminal, a line every few seconds elsewhere (a Slurm log); metrics to a tracker if asked.

And how whoever asked for long work watches it.
"""

import importlib
import logging
import queue
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any

from tqdm import tqdm

from sae.base.errors import ConfigError, Stopped
from sae.base.units import duration

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10.0
CALLS_WAITING = 10_000  # of a tracker that does not keep up
FINISH_S = 60.0


@dataclass(frozen=True)
class Watch:
    """What long work takes from whoever asked for it."""

    should_stop: Callable[[], bool] = lambda: False
    """Polled; once it returns true, the work ends with Stopped."""
    progress: Callable[[int], None] = lambda n: None
    """Called with how far the work is."""
    repair: bool = False
    """Whether what is stored is verified, and made again if it is damaged."""

    def poll(self, doing: str) -> None:
        """Raises Stopped, saying during what, when asked to stop."""
        if self.should_stop():
            raise Stopped(doing)


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


def on_terminal() -> bool:
    """Returns whether somebody may watch a bar; standard error may be a file, or closed."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


class Progress:
    """Shows how far a loop is and when it will end. Only rank 0 should make a visible one."""

    def __init__(self, label: str, total: int | None, unit: str, start: int = 0, visible: bool = True) -> None:
        self.label, self.total, self.unit, self.n, self.visible = label, total, unit, start, visible
        self.first, self.began = start, time.monotonic()
        self.last_line = self.began
        self.bar: Any = None
        self.aside = Aside("the progress bar", "the work goes on without it")
        with self.aside:
            if visible and on_terminal():
                self.bar = tqdm(total=total, initial=start, desc=label, unit=f" {unit}", disable=False)

    def update(self, n: int, **shown: float) -> None:
        """Moves to position n and shows a few numbers."""
        moved, self.n = n - self.n, n
        if self.bar is not None:
            with self.aside:
                self.bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items()}, refresh=False)
                self.bar.update(moved)
            if self.aside.failed:
                self.bar.disable = True  # so that it does not try again when it is deleted
                self.bar = None
        now = time.monotonic()
        if self.visible and self.bar is None and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            log.info("%s %s%s%s", self.label, self._position(), self._eta(now), _shown(shown))

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            with self.aside:
                self.bar.close()

    def _position(self) -> str:
        return f"{self.n:,}{f'/{self.total:,}' if self.total else ''} {self.unit}"

    def _eta(self, now: float) -> str:
        if not self.total or self.n <= self.first:
            return ""
        seconds = (now - self.began) / (self.n - self.first) * (self.total - self.n)
        return f", {duration(seconds)} left"


def _shown(values: dict[str, float]) -> str:
    return "".join(f"  {key} {value:.4g}" for key, value in values.items())


class Tracker:
    """Sends metrics to wandb or trackio, which take the same calls; "none" sends nothing.

    They are made in a thread of their own: whatever becomes of them, it neither ends the run nor holds it up. Only one
    that cannot begin is refused, with ConfigError.
    """

    def __init__(self, name: str, project: str, run: str, config: dict[str, Any]) -> None:
        self.module: Any = None
        self.aside = Aside(f"log.tracker: {name}", "the run goes on, its figures are in metrics.jsonl")
        self._calls: queue.Queue[tuple[Future[Any], Callable[[], Any]]] = queue.Queue(CALLS_WAITING)
        self._made: deque[Future[Any]] = deque()
        if name == "none":
            return
        Thread(target=self._work, name="tracker", daemon=True).start()
        try:
            self.module = importlib.import_module(name)
            self._send(partial(self.module.init, project=project, name=run, config=config)).result()
        except Exception as error:  # not logged in, no network, a package that does not fit: known before any long work
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                raise ConfigError(f"log.tracker: {name} is not installed; pip install 'sae-interp[{name}]'") from error
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(f"log.tracker: {name} cannot begin ({reason}); log.tracker: none does without") from error

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends one line of metrics."""
        if self.module is not None:
            while self._made and self._made[0].done():
                with self.aside:
                    self._made.popleft().result()
            with self.aside:
                self._made.append(self._send(partial(self.module.log, values, step=step)))

    def finish(self) -> None:
        """Ends the tracker's run, waiting a minute at most for what is on its way."""
        if self.module is None:
            return
        with self.aside:
            self._made.append(self._send(self.module.finish))
        end = time.monotonic() + FINISH_S
        for call in self._made:
            with self.aside:
                try:
                    call.result(max(0.0, end - time.monotonic()))
                except TimeoutError as error:
                    raise TimeoutError(f"still at it after {FINISH_S:g} s") from error

    def _send(self, call: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        self._calls.put_nowait((future, call))
        return future

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:  # an exit too is for the thread that asked
                future.set_exception(error)
