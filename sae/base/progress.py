"""Progress: a bar on a terminal, a line every few seconds elsewhere (a Slurm log); metrics to a tracker if asked.

And how whoever asked for long work watches it.
"""

import importlib
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from sae.base.errors import ConfigError, Stopped
from sae.base.units import duration

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10.0


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


class Progress:
    """Shows how far a loop is and when it will end. Only rank 0 should make a visible one."""

    def __init__(self, label: str, total: int | None, unit: str, start: int = 0, visible: bool = True) -> None:
        self.label, self.total, self.unit, self.n, self.visible = label, total, unit, start, visible
        self.first, self.began = start, time.monotonic()
        self.last_line = self.began
        on_terminal = visible and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, desc=label, unit=f" {unit}") if on_terminal else None

    def update(self, n: int, **shown: float) -> None:
        """Moves to position n and shows a few numbers."""
        if self.bar is not None:
            self.bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items()}, refresh=False)
            self.bar.update(n - self.n)
        self.n = n
        now = time.monotonic()
        if self.visible and self.bar is None and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            log.info("%s %s%s%s", self.label, self._position(), self._eta(now), _shown(shown))

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
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
    """Sends metrics to wandb or trackio, which take the same calls; "none" sends nothing."""

    def __init__(self, name: str, project: str, run: str, config: dict[str, Any]) -> None:
        self.module: Any = None
        if name == "none":
            return
        try:
            self.module = importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"log.tracker: {name} is not installed; pip install 'sae-interp[{name}]'") from error
        self.module.init(project=project, name=run, config=config)

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends one line of metrics."""
        if self.module is not None:
            self.module.log(values, step=step)

    def finish(self) -> None:
        """Ends the tracker's run."""
        if self.module is not None:
            self.module.finish()
