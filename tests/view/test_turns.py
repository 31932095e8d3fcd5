"""Turns: one thread for the model, a step for each, and an end for what nobody waits for."""

import asyncio
import threading
import time

import pytest

from interp.view.serving.limits import Limits
from interp.view.serving.refusing import Refused
from interp.view.serving.turns import Turns


@pytest.fixture
def make():
    made = []

    def turns(**limits):
        made.append(Turns(Limits(**limits)))
        return made[-1]

    yield turns
    for one in made:
        one.end()
        one.join(5)


async def until(so):
    async with asyncio.timeout(10):
        while not so():
            await asyncio.sleep(0.001)


async def gathered(turns, steps, who=None):
    return [piece async for piece in turns.pieces(steps, who)]


def test_steps_come_in_turns_and_in_one_thread(make):
    turns, log = make(), []

    def work(name, gate):
        for number in range(3):
            assert gate.wait(10)
            log.append((name, number, threading.current_thread().name))
            yield f"{name}{number}"

    async def main():
        gate = threading.Event()
        jobs = [asyncio.create_task(gathered(turns, work(name, gate))) for name in "abc"]
        await until(lambda: len(turns._waiting) + len(turns._open) == 2)  # the first one waits at its gate
        gate.set()
        return await asyncio.gather(*jobs)

    assert asyncio.run(main()) == [[f"{name}{number}" for number in range(3)] for name in "abc"]
    assert {thread for _, _, thread in log} == {"turns"}
    assert [name for name, _, _ in log] == list("abc" * 3)


def test_one_that_nobody_waits_for_ends(make):
    turns, closed, steps = make(), threading.Event(), []

    def work():
        try:
            while True:
                steps.append(1)
                time.sleep(0.001)
                yield len(steps)
        finally:
            closed.set()

    async def main():
        pieces = turns.pieces(work())
        async for piece in pieces:
            if piece == 3:
                break
        await pieces.aclose()

    asyncio.run(main())
    assert closed.wait(5)
    taken = len(steps)
    time.sleep(0.02)
    assert len(steps) == taken


def test_what_it_raises_is_raised_and_the_thread_goes_on(make):
    turns = make()

    def wrong():
        yield 1
        raise KeyError("x")

    async def main():
        with pytest.raises(KeyError):
            await gathered(turns, wrong())
        return await turns.one(iter_of(7))

    assert asyncio.run(main()) == 7


def iter_of(*pieces):
    yield from pieces


def test_too_many_too_long_and_after_the_end(make):
    turns = make(open=1, waiting=1, seconds=0.05)
    gate, begun = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert gate.wait(10)
        yield 1
        yield 2

    async def main():
        first = asyncio.create_task(gathered(turns, slow()))
        await until(begun.is_set)
        second = asyncio.create_task(gathered(turns, iter_of(3)))
        await until(lambda: len(turns._waiting) == 1)
        with pytest.raises(Refused) as many:
            await gathered(turns, iter_of(4))
        await asyncio.sleep(0.06)
        gate.set()
        ended = await asyncio.gather(first, second, return_exceptions=True)
        turns.end()
        with pytest.raises(Refused, match="the server ends"):
            await gathered(turns, iter_of(5))
        return many.value, ended

    many, (first, second) = asyncio.run(main())
    assert (many.status, many.wait_s > 0) == (429, True)
    assert isinstance(first, Refused)
    assert "more than 0.05 s" in str(first)
    assert isinstance(second, Refused)


def test_who_has_nothing_under_way_comes_first(make):
    turns, order, gate = make(open=2), [], threading.Event()

    def work(name):
        assert gate.wait(10)
        order.append(name)
        yield name
        yield name

    async def main():
        jobs = []
        for name in ("a", "a", "a", "a", "b"):
            jobs.append(asyncio.create_task(gathered(turns, work(name), name)))
            await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(*jobs)

    asyncio.run(main())
    assert order.index("b") <= 2


def test_the_end_ends_all_at_their_next_step(make):
    turns = make()

    def endless():
        while True:
            time.sleep(0.001)
            yield 1

    async def main():
        job = asyncio.create_task(gathered(turns, endless()))
        await asyncio.sleep(0.02)
        turns.end()
        with pytest.raises(Refused, match="the server ends"):
            await job

    asyncio.run(main())
    turns.join(5)
    assert not turns._thread.is_alive()
