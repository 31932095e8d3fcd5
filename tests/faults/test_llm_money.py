"""Rows 26 to 28 and 34: no question is paid twice, no budget is broken, and no key is shown anywhere."""

import asyncio
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from rigs.fake_llm import (
    KEY,
    Answer,
    FakeLLM,
    Fault,
    dropped,
    endpoint,
    error,
    hang,
    hurry,
    impatient,
    no_quota,
    web_page,
)

from interp.client.cache import Cache
from interp.client.client import Client
from interp.client.config import EndpointConfig
from interp.client.requests import Chat, Embed, Reply
from sae.base.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    impatient(monkeypatch)


def question(number=0, **asked):
    return Chat("judge", (("user", f"question {number}"),), **{"max_tokens": 50, **asked})


def run(fake, cache, work, budget=None, **changes):
    async def whole():
        async with Client({"judge": endpoint(fake, **changes)}, cache / "cache", budget) as client:
            await client.abilities("judge")
            return await work(client), client.ledger

    return asyncio.run(whole())


# Row 26

KILLED = """
import asyncio, sys
from pathlib import Path
from interp.client.client import Client
from interp.client.config import EndpointConfig
from interp.client.requests import Chat

async def main(url, cache):
    config = EndpointConfig(model="fake", base_urls=(url,), max_concurrency=4)
    async with Client({"judge": config}, Path(cache)) as client:
        async def one(number):
            reply = await client.ask(Chat("judge", (("user", f"question {number}"),), 50))
            print(number, reply.ok, flush=True)
        await asyncio.gather(*map(one, range(400)))

asyncio.run(main(*sys.argv[1:]))
"""


def about(fake, questions) -> list:
    asked = [call.body.get("messages", [{}])[-1].get("content") for call in fake.calls]
    return [one for one in asked if one in questions]


def test_a_kill_between_reply_and_journal_costs_no_second_call(tmp_path):
    with FakeLLM(lambda asked: Answer("hi", delay_s=0.005)) as fake:
        for _ in range(2):
            argv = [sys.executable, "-c", KILLED, fake.url, str(tmp_path / "cache")]
            with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
                assert child.stdout is not None
                told = [child.stdout.readline() for _ in range(20)]
                os.kill(child.pid, signal.SIGKILL)
                told += child.stdout.readlines()
            assert child.returncode == -signal.SIGKILL
            known = {line.split()[0] for line in told if line.endswith("True\n")}
            assert len(known) >= 20
            asked = [f"question {number}" for number in known]
            calls = len(about(fake, asked))  # of what was on its way the server may hear only now

            async def again(client, numbers=tuple(known)):
                return await client.ask_all([question(int(number)) for number in numbers])

            replies, _ = run(fake, tmp_path, again, max_concurrency=4)
            assert all(reply.cached for reply in replies)
            assert len(about(fake, asked)) == calls == len(asked)  # all that was handed on is on disk


# Row 27


def test_the_same_question_twice_at_once_is_one_call(tmp_path):
    async def work(client):
        return await asyncio.gather(*(client.ask(question()) for _ in range(20)))

    with FakeLLM(lambda asked: Answer("hi", delay_s=0.1)) as fake:
        replies, ledger = run(fake, tmp_path, work, price_in=1.0, price_out=1.0)
        assert len(fake.asked("question")) == 1
    assert {reply.text for reply in replies} == {"hi"}
    assert sum(not reply.cached for reply in replies) == 1
    account = ledger.accounts["judge"]
    assert account.cached == 19
    assert account.usd == pytest.approx((account.tokens_in + account.tokens_out) / 1e6)


def test_one_who_goes_away_does_not_take_the_answer_of_another(tmp_path):
    async def work(client):
        first = asyncio.create_task(client.ask(question()))
        second = asyncio.create_task(client.ask(question()))
        while not fake.asked("question"):
            await asyncio.sleep(0.001)
        first.cancel()
        return await second

    with FakeLLM(lambda asked: Answer("hi", delay_s=0.1)) as fake:
        reply, _ = run(fake, tmp_path, work)
        assert reply.text == "hi"
        assert len(fake.asked("question")) == 1


def test_other_questions_are_other_calls(tmp_path):
    asked = [
        question(),
        question(sample=1),
        question(temperature=1.0),
        question(max_tokens=51),
        Chat("judge", (("system", "question 0"),), 50),
    ]

    async def work(client):
        return await client.ask_all(asked)

    with FakeLLM() as fake:
        run(fake, tmp_path, work)
        calls = len(fake.calls)
        run(fake, tmp_path, work)
        assert len(fake.calls) == calls
        run(fake, tmp_path, work, model="another")
        assert len(fake.asked("question")) == 10


# Row 28


def test_a_budget_is_never_exceeded_and_what_is_missing_is_shown(tmp_path):
    async def work(client):
        return await client.ask_all([question(n) for n in range(300)])

    def answer(asked):
        return Answer("hi", usage=(100, 50), delay_s=0.002)

    with FakeLLM(answer) as fake:
        replies, ledger = run(fake, tmp_path, work, budget=0.02, price_in=1.0, price_out=2.0)
        made = len(fake.asked("question"))
        assert sum(reply.ok for reply in replies) == made
        assert {reply.failure for reply in replies} == {"", "budget"}
        assert 0.02 - 8 * 400e-6 < ledger.usd <= 0.02
        assert ledger.accounts["judge"].failures == {"budget": 300 - made}
        assert ledger.spent_out
        replies, ledger = run(fake, tmp_path, work, budget=1.0, price_in=1.0, price_out=2.0)
    assert all(reply.ok for reply in replies)
    assert sum(reply.cached for reply in replies) == made


def test_a_call_whose_answer_is_lost_counts_as_spent(tmp_path):
    async def work(client):
        fake.faults.extend([hang(), dropped()])
        hurry(client, 0.6)
        before = client.ledger.usd
        await client.ask(question())
        return client.ledger.usd - before

    with FakeLLM(lambda asked: Answer("hi", usage=(10, 1))) as fake:
        spent, ledger = run(fake, tmp_path, work, budget=1.0, price_in=0.0, price_out=1.0)
    assert spent == pytest.approx((50 + 50 + 1) / 1e6)
    assert ledger.accounts["judge"].estimated == 2


def test_tokens_are_guessed_where_no_server_tells(tmp_path):
    async def work(client):
        return await client.ask(question())

    with FakeLLM(lambda asked: Answer("a" * 40, usage=None)) as fake:
        reply, ledger = run(fake, tmp_path, work)
    assert reply.tokens_out == 10
    assert 20 <= reply.tokens_in <= 60
    assert ledger.accounts["judge"].estimated > 0


def test_a_budget_without_a_price_is_refused_before_any_call(tmp_path):
    remote = EndpointConfig(model="m", base_urls=("https://llm.example/v1",))
    with pytest.raises(ConfigError, match=r"budget_usd: 5 .* price of judge is unknown; set judge\.price_in"):
        Client({"judge": remote, "explainer": EndpointConfig()}, tmp_path / "cache", budget_usd=5)
    local = {
        "judge": EndpointConfig(model="quickstart", via="local"),
        "reader": EndpointConfig(model="m", base_urls=("http://[::1]:1/v1",)),
    }
    assert Client(local, tmp_path / "cache", budget_usd=5).ledger.usd == 0


# Row 34

SECRET_FAULTS = [
    error(400, f"bad request with key {KEY}"),
    error(400, f"Bearer {KEY} is wrong\nand more"),
    error(400, "Incorrect API key provided: sk-other-9876543210abcdef. You can find it at"),
    error(400, "token hf_abcdefghijklmnop"),
    web_page(),
    no_quota(),
    Fault(401, f"key {KEY}"),
]


def test_no_key_is_in_any_reply_log_or_file(tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    shown = []

    async def work(client):
        fake.faults.extend(SECRET_FAULTS)
        for number in range(7):
            shown.append(repr(await client.ask(question(number))))
        shown.extend([repr(client), repr(vars(client)), json.dumps(client.ledger.totals())])
        for holder in client._holders.values():
            shown.append(repr(holder) + repr(vars(holder)))

    with FakeLLM() as fake:
        run(fake, tmp_path, work, max_tries=1)
        assert f"Bearer {KEY}" in [call.headers["authorization"] for call in fake.calls]  # it was used
    printed = capsys.readouterr()
    shown += [printed.out, printed.err, caplog.text]
    shown += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert sum("***" in text for text in shown) >= 4
    for text in shown:
        for secret in (KEY, "sk-other", "hf_abcdefgh"):
            assert secret not in text


def test_a_missing_key_is_named_and_a_server_on_loopback_needs_none(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")

    async def work(client):
        return await client.ask(question())

    with FakeLLM() as fake:
        assert run(fake, tmp_path, work)[0].ok

    async def remote():
        config = EndpointConfig(model="m", base_urls=("https://llm.example/v1",))
        async with Client({"judge": config}, tmp_path / "other") as client:
            await client.ask(question())

    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        asyncio.run(remote())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"api_key_env": KEY}, "judge.api_key_env: not the name"),
        ({"base_urls": (f"https://user:{KEY}@llm.example/v1",)}, "judge.base_urls: an address holds no keys"),
        ({"base_urls": (f"https://llm.example:x/v1?key={KEY}",)}, "judge.base_urls: 'https://llm.example:x/v1' is no"),
        ({"base_urls": ("localhost:8000",)}, "judge.base_urls: 'localhost:8000' is no address"),
        ({"via": "htpp"}, "judge.via: 'htpp' is not one of http, local, batch. Did you mean 'http'?"),
        ({"via": "local", "base_urls": ("http://a/v1",)}, "judge.base_urls"),
        ({"via": "batch", "base_urls": ("http://a/v1", "http://b/v1")}, "judge.base_urls: 2 addresses"),
        ({"max_concurrency": 0}, "judge.max_concurrency: 0"),
        ({"max_tries": 0}, "judge.max_tries"),
        ({"timeout_s": 0.0}, "judge.timeout_s"),
        ({"thinking_tokens": -1}, "judge.thinking_tokens"),
        ({"price_in": 1.0}, "judge.price_in, judge.price_out"),
        ({"price_in": -1.0, "price_out": 1.0}, "judge.price_in: -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused_without_showing_a_key(changes, told):
    with pytest.raises(ConfigError) as caught:
        EndpointConfig(**{"model": "m", **changes}).validate("judge")
    assert told in str(caught.value)
    assert KEY not in str(caught.value)


# The file


def test_replies_survive_the_file(tmp_path):
    replies = {
        "a": Reply(text="x\n\u00e9", data={"p": [1, 2.5, None, "y"]}, tokens_in=3, tokens_out=4),
        "b": Reply(probabilities={"yes": 0.25}, failure=""),
        "c": Reply(logprobs=((-1.5,), (float("-inf"), 0.0)), counts=(2, 1)),
        "d": Reply(vectors=((0.5, 1.25), (-3.0, 0.0))),
        "e": Reply(text="half", failure="length", detail="cut"),
        "f": Reply(data=False),
        "g": Reply(failure="timeout"),
        "h": Reply(failure="quota"),
    }

    async def work():
        cache = Cache(tmp_path / "cache")
        await cache.keep(replies)
        found = {key: cache.reply(key) for key in replies}
        cache.close()
        return found, Cache(tmp_path / "cache")

    found, again = asyncio.run(work())
    for key in "abcdef":
        assert vars(found[key]) == vars(replies[key]) | {"cached": True}
        assert again.reply(key) == found[key]
    assert found["g"] is found["h"] is None  # they may succeed another time
    again.close()


def test_facts_are_written_whole_and_forgotten(tmp_path):
    async def work():
        cache = Cache(tmp_path / "cache")
        await cache.note({"batch 1": {"open": True}, "batch 2": [1], "other": 3})
        await cache.note({"batch 2": None})
        found = cache.facts("batch ")
        cache.close()
        return found

    assert asyncio.run(work()) == {"batch 1": {"open": True}}


def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n" * 1000)
    with pytest.raises(DataError, match=r"notes\.txt is no cache of answers"):
        Cache(path)
    assert path.read_text() == "my notes\n" * 1000
    with pytest.raises(ConfigError, match="cache: cannot write to"):
        Cache(tmp_path)
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("PRAGMA user_version=99")
    newer.close()
    with pytest.raises(DataError, match="later version"):
        Cache(tmp_path / "newer")


def test_a_disk_that_is_full_is_an_error_not_a_silence(tmp_path):
    async def work():
        cache = Cache(tmp_path / "cache")
        cache._store = _full
        try:
            await cache.keep({"a": Reply(text="x")})
        finally:
            cache.close()

    with pytest.raises(OSError, match="database or disk is full"):
        asyncio.run(work())


def _full(*_arguments):
    raise sqlite3.OperationalError("database or disk is full")


def test_texts_are_not_in_the_file(tmp_path):
    async def work(client):
        return await client.ask(question("a private text"))

    with FakeLLM() as fake:
        run(fake, tmp_path, work)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"private" not in stored


def test_an_encoder_without_a_model_answers_too(tmp_path):
    async def work():
        config = EndpointConfig(model="tfidf", via="local")
        async with Client({"encoder": config}, tmp_path / "cache") as client:
            able = await client.abilities("encoder")
            return able, await client.ask(Embed("encoder", ("a cat", "a dog", "the cat"))), client.ledger.totals()

    able, reply, totals = asyncio.run(work())
    assert able.fits_texts
    assert len(reply.vectors) == 3
    assert totals["usd"] == 0
