"""Work that waits for answers, from plain code and from inside a running event loop."""

import asyncio
import threading

import pytest

from interp.client.running import finished


async def where() -> str:
    await asyncio.sleep(0)
    return threading.current_thread().name


async def fails() -> None:
    raise KeyError("x")


def test_in_its_own_thread_unless_a_loop_runs_there():
    assert finished(where()) == threading.current_thread().name

    async def cell() -> str:
        return finished(where())

    assert asyncio.run(cell()).startswith("asking")


def test_an_error_is_the_callers():
    async def cell() -> None:
        finished(fails())

    for call in (lambda: finished(fails()), lambda: asyncio.run(cell())):
        with pytest.raises(KeyError, match="x"):
            call()
