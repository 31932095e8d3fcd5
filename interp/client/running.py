"""Coroutines run to their end from plain code, also where an event loop is running already: a notebook has one."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def finished(work: Coroutine[Any, Any, T]) -> T:
    """Returns what a coroutine returns; where this thread has a running loop, from a thread with one of its own.

    The caller waits meanwhile, and its handlers of signals are called as ever.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="asking") as thread:
        return thread.submit(asyncio.run, work).result()
