"""What is said while work goes on: by our own loggers alone, on standard error; the root logger is nobody's but yours.

$SAE_LOG says how much: debug, info, warning or error. Commands say what `info` does unless told otherwise; a program
that imports us hears warnings, by the rules of `logging`, unless $SAE_LOG is set or it sets up loggers itself.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from sae.base.errors import ConfigError, nearest

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
OURS = ("sae", "interp")


def asked_level() -> int | None:
    """Returns the level that $SAE_LOG names, None where it is not set; ConfigError if there is no such level."""
    typed = os.environ.get("SAE_LOG", "").strip().lower()
    if typed and typed not in LEVELS:
        raise ConfigError(f"SAE_LOG: {typed!r} is not one of {', '.join(LEVELS)}.{nearest(typed, LEVELS)}")
    return LEVELS[typed] if typed else None


def quiet() -> bool:
    """Returns whether nothing but warnings and errors is wanted, so that bars are not either."""
    return logging.getLogger(OURS[0]).level > logging.INFO  # of its own; one that is not set up says nothing of bars


class _Stderr(logging.StreamHandler):
    """Writes to what is standard error at the time: a notebook and a test put their own there."""

    def __init__(self, beside_root: bool = True) -> None:
        super().__init__(sys.stderr)
        self.beside_root = beside_root
        """Whether it speaks where root has handlers too, which hear the same."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None and (self.beside_root or not logging.getLogger().handlers):
            self.stream: Any = sys.stderr
            super().emit(record)


@contextmanager
def listening(level: int, *others: str) -> Iterator[None]:
    """Shows what our loggers and `others` say from a level on, for the time of the block."""
    loggers = [logging.getLogger(name) for name in (*OURS, *others)]
    before = [(logger.level, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.handlers = [_Stderr(), *(one for one in logger.handlers if not isinstance(one, _Stderr))]
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, (was, handlers) in zip(loggers, before, strict=True):
            logger.handlers = handlers
            logger.setLevel(was)


@cache
def listen_if_asked() -> None:
    """Shows from now on what our loggers say to a program that uses us, if $SAE_LOG is set and root has no handlers.

    A level that is none is warned of: no work should end of it.
    """
    try:
        level = asked_level()
    except ConfigError as error:
        logging.getLogger(__name__).warning("%s", error)
        return
    for name in OURS if level is not None else ():
        logger = logging.getLogger(name)
        logger.setLevel(level or logging.NOTSET)
        logger.addHandler(_Stderr(beside_root=False))
