"""Errors of what a command calls, told by the names under which their values were typed."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from sae.base.errors import ConfigError


@contextmanager
def as_typed(options: argparse.Namespace, **others: str) -> Iterator[None]:
    """Makes `top_p: 2 is ...` of a ConfigError in the block `--top-p: 2 is ...`, where that option was typed.

    `others` are the names of what is called otherwise: text="--prompt".
    """
    try:
        yield
    except ConfigError as error:
        name, colon, told = str(error).partition(":")
        own = f"--{name.replace('_', '-')}" if getattr(options, name, None) is not None else name
        raise ConfigError(others.get(name, own) + colon + told) from error
