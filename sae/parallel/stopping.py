"""Stopping cleanly: SIGTERM, SIGUSR1 and Ctrl-C set a flag that every long loop polls; the second one ends at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sae.parallel import collectives

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


class StopFlag:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __call__(self) -> bool:
        """Returns whether this process was asked to stop."""
        return self.signal_name is not None

    def anywhere(self) -> bool:
        """Returns whether any rank was asked to stop; every rank must call it at the same step."""
        return collectives.any_rank(self())


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Yields a flag set by the first signal; the handlers are put back on leaving."""
    flag = StopFlag()

    def handle(number: int, _: FrameType | None) -> None:
        if flag.signal_name is not None:
            os._exit(128 + number)
        flag.signal_name = signal.Signals(number).name

    old = {}
    for name in SIGNALS:
        try:
            old[name] = signal.signal(getattr(signal, name), handle)
        except ValueError:  # not the main thread: the caller owns the signals
            break
    try:
        yield flag
    finally:
        for name, handler in old.items():
            signal.signal(getattr(signal, name), handler)
