"""Turns, pauses and costs, by themselves; and that asking costs no import of what is heavy."""

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import pytest

from interp.client.config import EndpointConfig
from interp.client.ledger import Ledger, Usage, estimated_accounts
from interp.client.remote import limiter
from interp.client.remote.failures import retry_after, scrub
from interp.client.remote.limiter import Closed, Limiter
from interp.client.requests import Chat, Embed, LogProb

ROOT = Path(__file__).parent.parent.parent


def test_no_turn_is_lost_whatever_happens_to_those_who_wait():
    draw = random.Random(0)

    async def run():
        shared, most, done = Limiter(5), 0, 0

        async def work():
            nonlocal most, done
            await shared.enter()
            try:
                most = max(most, shared.active)
                await asyncio.sleep(draw.uniform(0, 0.003))
                done += 1
            finally:
                shared.leave()

        tasks = [asyncio.create_task(work()) for _ in range(300)]
        for task in draw.sample(tasks, 150):
            await asyncio.sleep(draw.uniform(0, 0.0005))
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return most, done, shared.active

    most, done, active = asyncio.run(run())
    assert (most, active) == (5, 0)
    assert done >= 150


def test_one_overload_halves_the_limit_once_and_successes_raise_it_again():
    async def run():
        shared = Limiter(64)
        started = [await shared.enter() for _ in range(8)]
        await asyncio.sleep(0.001)
        for when in started:
            shared.overloaded(when, None, pause=False)
            shared.leave()
        cut = shared.limit
        for _ in range(32):
            shared.succeeded()
        raised = shared.limit
        for _ in range(10_000):
            shared.succeeded()
        return cut, raised, shared.limit

    cut, raised, full = asyncio.run(run())
    assert cut == 32
    assert 32.9 < raised <= 33
    assert full == 64


def test_the_limit_never_falls_below_one(monkeypatch):
    monkeypatch.setattr(limiter, "FIRST_PAUSE_S", 0.0001)
    monkeypatch.setattr(limiter, "LONGEST_PAUSE_S", 0.0001)

    async def run():
        shared = Limiter(8)
        for _ in range(20):
            shared.overloaded(await shared.enter(), None, pause=True)
            shared.leave()
        return shared.limit

    assert asyncio.run(run()) == 1


def test_a_closed_endpoint_lets_all_who_wait_go_and_opens_again(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(limiter, "_now", lambda: clock[0])

    async def run():
        shared = Limiter(1)
        await shared.enter()
        waiting = [asyncio.create_task(shared.enter()) for _ in range(5)]
        resting = asyncio.create_task(shared.rest(1e6))
        await asyncio.sleep(0)
        shared.close("rate_limit", "later", 5)
        found = await asyncio.gather(*waiting, return_exceptions=True)
        await resting
        shared.leave()
        clock[0] = 4.9
        with pytest.raises(Closed):
            await shared.enter()
        clock[0] = 5.0
        await shared.enter()
        return found

    assert [(error.failure, error.detail) for error in asyncio.run(run())] == [("rate_limit", "later")] * 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[("3", 3), ("0.5", 0.5), ("-1", 0), ("soon", None), ("", None)],
        *[("Wed, 21 Oct 2015 07:28:00 GMT", 7), ("Wed, 21 Oct 2015 07:27:00 GMT", 0)],
    ],
)
def test_the_wait_that_a_server_asks_for(text, expected, monkeypatch):
    monkeypatch.setattr("interp.client.remote.failures.time.time", lambda: 1445412473.0)  # 07:27:53
    assert retry_after({"retry-after": text}) == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key sk-proj-AbC123_xyz-9 is bad", "key *** is bad"),
        ("Incorrect key: sk-abcd********wxyz.", "Incorrect key: ***"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("the skyscrapers and the keyboardists", "the skyscrapers and the keyboardists"),
        ("my own secret", "my own ***"),
        ("two\n  lines", "two lines"),
    ],
)
def test_messages_are_scrubbed(text, shown):
    assert scrub(text, ["secret"]) == shown
    assert len(scrub(text * 100)) <= 200


def test_a_ledger_counts_and_an_estimate_asks_nobody():
    endpoints = {
        "judge": EndpointConfig(model="m", base_urls=("https://a/v1",), price_in=2.0, price_out=10.0),
        "reader": EndpointConfig(model="quickstart", via="local"),
        "encoder": EndpointConfig(model="e", base_urls=("https://a/v1",)),
    }
    ledger = Ledger({**endpoints, "encoder": EndpointConfig()}, budget_usd=1.0)
    assert ledger.reserve("judge", Usage(1000, 100))
    ledger.settle("judge", Usage(1000, 100), Usage(500, 50))
    assert ledger.usd == pytest.approx(500 * 2e-6 + 50 * 10e-6)
    assert not ledger.reserve("judge", Usage(10**6, 0))
    asked = [
        Chat("judge", (("user", "x" * 400),), 50),
        Chat("judge", (("user", "x" * 400),), 50, choices=("a", "b")),
        LogProb("reader", "x" * 40, ((0, 40),)),
        Embed("encoder", ("x" * 40, "y")),
    ]
    found = estimated_accounts(asked, endpoints)
    assert found["judge"].calls == 2
    assert 200 <= found["judge"].tokens_in <= 260
    assert found["judge"].tokens_out == 51
    assert found["judge"].usd == pytest.approx(found["judge"].tokens_in * 2e-6 + 51 * 10e-6)
    assert (found["reader"].usd, found["reader"].tokens_in) == (0.0, 10)
    assert found["encoder"].usd is None
    assert Ledger(endpoints).usd is None


def test_importing_the_client_loads_nothing_heavy():
    heavy = ("torch", "transformers", "openai", "datasets", "sklearn", "numpy")
    code = f"import sys, interp.client; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
