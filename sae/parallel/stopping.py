"""Stopping cleanly: SIGTERM, SIGUSR1 and Ctrl-C set a flag that every long loop polls; the second one ends at once.

Of several ranks one that was asked is enough: the others hear of it by the heartbeat.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from sae.parallel.launch import launch

SIGNALS = tuple(name for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))  # Windows lacks the second
_flags: list["StopFlag"] = []
early: list[str] = []
"""Signals that came when there was no flag yet, in the middle of an import: the next one is set by them."""


class StopFlag:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.peer_stops = False
        """Whether another rank was asked, which says so itself: it is no first signal to this one."""
        self.before: dict[str, Any] = {}
        """By signal, what would be done without the flag."""

    def __call__(self) -> bool:
        """Returns whether this process was asked to stop, or another rank."""
        return self.signal_name is not None or self.peer_stops

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Lets SIGTERM and Ctrl-C end the block at once, as without the flag: nobody polls it, and nothing can be lost.

        Of several ranks none ends alone, so that there the flag stays.
        """
        names = {"SIGTERM", "SIGINT"} & self.before.keys() if launch().world_size == 1 else ()
        own = {name: signal.signal(getattr(signal, name), self.before[name]) for name in names}
        try:
            yield
        finally:
            for name, handler in own.items():
                signal.signal(getattr(signal, name), handler)


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Yields a flag set by the first signal; the handlers are put back on leaving."""
    flag, launched = StopFlag(), launch().passes_on

    def handle(number: int, _: FrameType | None) -> None:
        name, again = signal.Signals(number).name, flag.signal_name is not None
        if again and launched and name != "SIGINT":  # a launcher's, once one rank has ended; it kills what hangs
            return
        if again and flag.before[name] is signal.default_int_handler:  # Python's own: a notebook's kernel lives on
            raise KeyboardInterrupt
        if launch().rank == 0:
            twice = "" if launched and name != "SIGINT" else "; another one ends it at once"
            say(f"{name}: {'ended at once' if again else f'stopping as soon as can be{twice}'}")
        if again:
            os._exit(128 + number)
        flag.signal_name = name

    for name in SIGNALS:
        try:
            flag.before[name] = signal.signal(getattr(signal, name), handle)
        except ValueError:  # not the main thread: the caller owns the signals
            break
    while early:
        flag.signal_name = early.pop()
        if launch().rank == 0:
            say(f"{flag.signal_name}: stopping as soon as can be")
    _flags.append(flag)
    try:
        yield flag
    finally:
        _flags.remove(flag)
        put_back(flag.before, flag())


def put_back(handlers: dict[str, Any], stopped: bool) -> None:
    """Sets the handlers of before, by signal.

    A rank that has stopped goes on to its end whatever SIGTERM or SIGUSR1 comes then: a launcher sends them to the
    others as soon as one has ended, and one that died of it would make a failure of the stop.
    """
    stopped = stopped and launch().passes_on
    for name, handler in handlers.items():
        ignored = stopped and name != "SIGINT"
        signal.signal(getattr(signal, name), signal.SIG_IGN if ignored else handler)


def asked() -> str:
    """Returns the name of the signal by which this process was asked to stop, or "" if it was not."""
    return next((name for name in (*(flag.signal_name for flag in _flags), *early) if name), "")


def peer_stops() -> None:
    """Sets the flags of this process, since another rank was asked to stop."""
    for flag in _flags:
        flag.peer_stops = True


def say(text: str) -> None:
    """Writes a line to standard error, past all buffers, one of which may be in use."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
