"""What one command leaves to the next: what was spent, what failed for good, and what is known of a server."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from rigs.fake_llm import KEY, Answer, FakeLLM, endpoint, error, hang, hurry, impatient, says

from interp.client.cache import Cache, spent_in
from interp.client.client import Client
from interp.client.config import EndpointConfig
from interp.client.ledger import Ledger, Usage, worst_case
from interp.client.requests import Chat
from sae.base.errors import ConfigError, DataError, Stopped
from sae.base.progress import UNWATCHED, Watch

ROOT = Path(__file__).parent.parent.parent
PRICE = {"price_in": 1.0, "price_out": 2.0}
USAGE = (100, 50)
USD = (100 + 2 * 50) / 1e6
SCHEMA = '{"type": "object", "properties": {"p": {"type": "number"}}, "required": ["p"]}'


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    impatient(monkeypatch)


def question(number=0, role="explainer", **asked):
    return Chat(role, (("user", f"question {number}"),), **{"max_tokens": 50, **asked})


def ask(fake, folder, requests, budget=None, *, retry_failed=False, watch=UNWATCHED, times=1, **changes):
    """One command, which asks the same so many times. Returns (the last replies, its ledger)."""

    async def run():
        roles = {"explainer": endpoint(fake, **changes)}
        async with Client(roles, folder / "cache", budget, watch, 0.01, retry_failed) as client:
            for _ in range(times):
                replies = await client.ask_all(requests)
            return replies, client.ledger

    return asyncio.run(run())


def paid(_):
    return Answer("hi", usage=USAGE)


# The budget


def test_the_same_command_again_does_not_spend_the_budget_again(tmp_path):
    wave = [question(n) for n in range(300)]
    with FakeLLM(paid) as fake:
        _, first = ask(fake, tmp_path, wave, 0.02, **PRICE)
        calls = len(fake.calls)
        assert 0.018 < first.usd <= 0.02
        stopped, second = ask(fake, tmp_path, wave, 0.02, **PRICE)
        assert len(fake.calls) <= calls + 2  # what was set aside for calls under way, and not used
        assert second.usd_in_all == pytest.approx(first.usd + second.usd)
        assert second.usd_in_all <= 0.02
        stop = [reply.cut_off for reply in stopped if not reply.ok][-1]
        assert stop.startswith(f"{second.usd_in_all:.4g} USD are spent in all")
        assert stop.endswith("the budget of 0.02 USD; a higher --budget-usd goes on")
        replies, third = ask(fake, tmp_path, wave, 0.03, **PRICE)
        assert [reply.cached for reply in replies] == [reply.ok for reply in stopped]
        assert 0.028 < third.usd_in_all <= 0.03
        assert len(fake.calls) * USD == pytest.approx(third.usd_in_all)
        replies, _ = ask(fake, tmp_path, wave, 1.0, **PRICE)
        assert all(reply.ok for reply in replies)
        found = spent_in(tmp_path / "cache")["explainer"]
        assert found["calls"] == len(fake.calls)
        assert (found["tokens_in"], found["tokens_out"]) == (100 * len(fake.calls), 50 * len(fake.calls))
        assert found["usd"] == pytest.approx(USD * len(fake.calls))


KILLED = """
import asyncio, sys
from pathlib import Path
from interp.client.client import Client
from interp.client.config import EndpointConfig
from interp.client.requests import Chat
from sae.base.progress import UNWATCHED, Watch

async def main(url, cache):
    config = EndpointConfig(model="fake", base_urls=(url,), max_concurrency=4, price_in=1.0, price_out=2.0)
    async with Client({"explainer": config}, Path(cache), 100.0) as client:
        async def one(number):
            await client.ask(Chat("explainer", (("user", f"question {number}"),), 50))
            print(number, flush=True)
        await asyncio.gather(*map(one, range(400)))

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_kill_forgets_nothing_that_was_paid_but_what_was_under_way(tmp_path):
    with FakeLLM(lambda _: Answer("hi", usage=USAGE, delay_s=0.005)) as fake:
        argv = [sys.executable, "-c", KILLED, fake.url, str(tmp_path / "cache")]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
            assert child.stdout is not None
            for _ in range(20):
                child.stdout.readline()
            os.kill(child.pid, signal.SIGKILL)
        found = spent_in(tmp_path / "cache")["explainer"]
        with sqlite3.connect(tmp_path / "cache") as connection:
            stored = connection.execute("SELECT count(*) FROM replies").fetchone()[0]
        assert stored >= 20
        assert stored < found["calls"]  # the probe's too
        assert len(fake.calls) - 4 <= found["calls"] <= len(fake.calls)
        assert found["usd"] == pytest.approx(found["calls"] * USD)
        _, ledger = ask(fake, tmp_path, [question(399)], found["usd"] + USD / 2, **PRICE)
        assert ledger.spent_out  # it counts on from there


def test_calls_whose_answer_is_lost_count_in_the_next_command_too(tmp_path):
    async def run():
        async with Client({"explainer": endpoint(fake, max_tries=1, **PRICE)}, tmp_path / "cache") as client:
            await client.abilities("explainer")
            before = client.ledger.usd
            fake.faults.append(hang())
            hurry(client, 0.3)
            reply = await client.ask(question())
            return reply, client.ledger.usd - before, client.ledger.usd

    with FakeLLM(paid) as fake:
        reply, lost, usd = asyncio.run(run())
        assert reply.failure == "timeout"
        assert lost >= 50 * 2e-6
        assert spent_in(tmp_path / "cache")["explainer"]["usd"] == pytest.approx(usd)


def test_what_had_no_price_is_counted_once_there_is_one(tmp_path):
    config = EndpointConfig(model="m", base_urls=("https://llm.example/v1",))
    ledger = Ledger({"judge": config})
    ledger.settle("judge", Usage(0, 0), Usage(1000, 100))

    async def stored():
        cache = Cache(tmp_path / "cache")
        await cache.keep({}, ledger.unsaved())
        ledger.settle("judge", Usage(0, 0), Usage(1000, 100))
        await cache.keep({}, ledger.unsaved())
        await cache.keep({}, ledger.unsaved())
        cache.close()

    asyncio.run(stored())
    found = spent_in(tmp_path / "cache")
    assert found["judge"] == {
        "calls": 2, "cached": 0, "tokens_in": 2000, "tokens_out": 200, "estimated": 0, "usd": None
    }  # fmt: skip
    ledger = Ledger({"judge": EndpointConfig(**{**vars(config), **PRICE})}, 0.01)
    ledger.start_from(found)
    assert ledger.usd_in_all == pytest.approx(2000e-6 + 200 * 2e-6)
    assert ledger.reserve("judge", Usage(7000, 0))
    assert not ledger.reserve("judge", Usage(7000, 0))


def test_sums_are_read_from_any_file_that_may_be_there(tmp_path):
    assert spent_in(tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()
    with sqlite3.connect(tmp_path / "older") as connection:
        connection.execute("CREATE TABLE replies (key TEXT)")
    assert spent_in(tmp_path / "older") == {}
    (tmp_path / "notes").write_text("my notes\n" * 100)
    with pytest.raises(DataError, match="no cache of answers"):
        spent_in(tmp_path / "notes")


def test_what_an_open_batch_may_cost_is_set_aside_in_the_next_command(tmp_path):
    stop = []
    with FakeLLM(lambda _: Answer("hi", usage=(10, 5)), batch_script=lambda _: stop.append(1)) as fake:
        wave, others = [question(n) for n in range(10)], [question(n) for n in range(10, 20)]
        changes = {"via": "batch", **PRICE}
        with pytest.raises(Stopped):
            ask(fake, tmp_path, wave, 1.0, watch=Watch(lambda: bool(stop)), **changes)
        probed = spent_in(tmp_path / "cache")["explainer"]["usd"]
        worst = worst_case(fake.batches[0].requests()[0]["body"])
        budget = probed + 15.5 * (worst.tokens_in + 2 * worst.tokens_out) / 1e6
        fake.batch_script = lambda batch: batch.finish()
        replies, ledger = ask(fake, tmp_path, others, budget, **changes)
        assert 4 <= [reply.failure for reply in replies].count("budget") <= 6  # some are a byte longer
        assert any("set aside for calls under way" in reply.cut_off for reply in replies)
        assert len(fake.batches) == 2
        replies, ledger = ask(fake, tmp_path, wave, budget, **changes)
        assert all(reply.ok for reply in replies)  # what is paid is collected all the same
        assert len(fake.batches) == 2
        assert ledger.usd_in_all <= budget
        assert ledger._reserved == pytest.approx(0)
        replies, ledger = ask(fake, tmp_path, others, budget, **changes)  # and what it did not take is free again
        assert all(reply.ok for reply in replies)
        assert ledger.usd_in_all <= budget


# What failed for good


@pytest.mark.parametrize("via", ["http", "batch"])
@pytest.mark.parametrize("bad", [Answer(None), Answer("an ans", finish="length"), Answer("x", finish="content_filter")])
def test_a_failure_that_is_stored_is_asked_again_where_that_is_wanted(via, bad, tmp_path):
    twice = [question(), question(1), question()]
    with FakeLLM(lambda asked: bad if "question 0" in asked.text else "hi") as fake:
        first, _ = ask(fake, tmp_path, twice, via=via)
        again, _ = ask(fake, tmp_path, twice, via=via)
        assert [reply.ok for reply in first] == [False, True, False]
        assert all(reply.cached for reply in again)
        fake.calls.clear()
        fake.batches.clear()
        still, _ = ask(fake, tmp_path, twice, retry_failed=True, times=2, via=via)
        assert len(fake.asked("question")) + sum(len(batch.requests()) for batch in fake.batches) == 1
        assert [reply.failure for reply in still] == [reply.failure for reply in first]
        fake.answer = lambda _: "better"
        mended, _ = ask(fake, tmp_path, twice, retry_failed=True, via=via)
        assert [reply.text for reply in mended] == ["better", "hi", "better"]
        kept, _ = ask(fake, tmp_path, twice, via=via)
    assert [(reply.text, reply.cached) for reply in kept] == [("better", True), ("hi", True), ("better", True)]


def test_an_answer_that_did_not_parse_is_asked_again_unless_it_was_mended_then(tmp_path):
    def clumsy(asked):
        mends = "cannot be used" in asked.text and "question 0" in str(asked.messages)
        return '{"p": 1}' if mends else "perhaps"

    asked = [question(0, schema=SCHEMA), question(1, schema=SCHEMA)]
    with FakeLLM(clumsy, schemas=()) as fake:
        first, _ = ask(fake, tmp_path, asked)
        assert [reply.failure for reply in first] == ["", "parse"]
        fake.calls.clear()
        fake.answer = lambda _: '{"p": 2}'
        again, _ = ask(fake, tmp_path, asked, retry_failed=True)
        assert len(fake.calls) == 1
    assert [reply.data["p"] for reply in again] == [1, 2]


def test_a_second_failure_that_may_pass_leaves_the_first_in_its_place(tmp_path):
    with FakeLLM(lambda asked: Answer(None) if "question" in asked.text else "hi") as fake:
        ask(fake, tmp_path, [question()])
        fake.answer = lambda _: error(500, "broken")
        assert ask(fake, tmp_path, [question()], retry_failed=True, max_tries=1)[0][0].failure == "server_error"
        assert ask(fake, tmp_path, [question()])[0][0].failure == "empty"


# What a batch answers beyond what was asked


def test_a_batch_that_answers_more_than_is_asked_now_is_paid_once(tmp_path):
    stop = []
    wave = [question(n, schema=SCHEMA) for n in range(8)]

    def finish(batch):
        names = sorted(entry["custom_id"] for entry in batch.requests())
        batch.finish(keep=lambda name: name != names[0], fail=lambda name: 400 if name == names[1] else 0)

    def script(_):
        stop.append(1)

    changes = {"via": "batch", **PRICE}
    with FakeLLM(lambda _: Answer('{"p": 0.5}', usage=USAGE), batch_script=script) as fake:
        with pytest.raises(Stopped):
            ask(fake, tmp_path, wave, watch=Watch(lambda: bool(stop)), **changes)
        before = spent_in(tmp_path / "cache")["explainer"]
        names = sorted(entry["custom_id"] for entry in fake.batches[0].requests())
        number = {
            entry["custom_id"]: int(entry["body"]["messages"][-1]["content"].split()[1])
            for entry in fake.batches[0].requests()
        }
        lost, failed, *good = [number[name] for name in names]
        fake.batch_script = finish
        fewer, _ = ask(fake, tmp_path, [wave[n] for n in good[:2]], **changes)
        assert [reply.data for reply in fewer] == [{"p": 0.5}] * 2
        found = spent_in(tmp_path / "cache")["explainer"]
        assert found["tokens_out"] - before["tokens_out"] == 6 * 50
        fake.batch_script = lambda batch: batch.finish()
        replies, ledger = ask(fake, tmp_path, wave, **changes)
        assert [len(batch.requests()) for batch in fake.batches] == [8, 1]  # the one that had no answer
        assert [reply.ok for reply in replies] == [n != failed for n in range(8)]
        assert (replies[failed].failure, replies[lost].cached) == ("bad_request", False)
        assert [replies[n].data for n in good] == [{"p": 0.5}] * 6
        assert all(replies[n].cached and replies[n].tokens_out == 50 for n in good)
        assert ledger.usd == pytest.approx(USD)
        again, _ = ask(fake, tmp_path, wave, via="http")
        assert [vars(reply) | {"cached": True} for reply in replies] == [vars(reply) for reply in again]
    assert KEY.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


# What is checked before any long work


def check(folder, roles, budget=None, **endpoints):
    async def run():
        async with Client(endpoints, folder / "cache", budget) as client:
            await client.check(roles)
            return [await client.abilities(role) for role in roles if endpoints[role].via != "local"]

    return asyncio.run(run())


def test_a_check_asks_the_server_once_and_the_run_asks_no_more(tmp_path):
    with FakeLLM() as fake:
        roles = {"judge": endpoint(fake), "encoder": EndpointConfig(model="tfidf", via="local")}
        found = check(tmp_path, ["judge", "encoder"], **roles)
        calls = len(fake.calls)
        assert calls > 0
        assert check(tmp_path, ["judge"], **roles) == found
        assert len(fake.calls) == calls
        fake.always = error(401, "bad key")
        with pytest.raises(ConfigError, match=r"^judge: the model 'new' at .* does not answer \(HTTP 401: bad key\)"):
            check(tmp_path, ["judge"], judge=endpoint(fake, model="new"))


@pytest.mark.parametrize(
    ("config", "budget", "told"),
    [
        ({"model": "m"}, 5.0, r"budget_usd: 5\.0 cannot be kept"),
        ({"model": "m", "base_urls": ("https://llm.example/v1",), "api_key_env": "NO_SUCH_KEY"}, None, "NO_SUCH_KEY"),
        ({"model": "/no/such/folder", "via": "local"}, None, r"^judge\.model: no such folder: /no/such/folder"),
        ({"model": "no/such.gguf", "via": "local"}, None, r"^judge\.model: no such file"),
        ({}, None, r"^judge\.model: not set"),
        ({"via": "local"}, None, r"^judge\.model: not set"),
    ],
)
def test_what_cannot_be_asked_is_an_error_of_one_line(config, budget, told, tmp_path):
    with pytest.raises(ConfigError, match=told) as caught:
        check(tmp_path, ["judge"], budget, judge=EndpointConfig(**config))
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_told_even_where_the_server_is_known(tmp_path, monkeypatch):
    config = EndpointConfig(model="m", base_urls=("https://llm.example/v1",))

    async def known():
        cache = Cache(tmp_path / "cache")
        await cache.note({"abilities https://llm.example/v1 m judge 0": {}})
        cache.close()

    asyncio.run(known())
    check(tmp_path, ["judge"], judge=config)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        check(tmp_path, ["judge"], judge=config)


def test_a_budget_that_is_spent_is_no_server_that_is_silent(tmp_path):
    with FakeLLM(paid) as fake:
        ask(fake, tmp_path, [question(n) for n in range(20)], 0.003, **PRICE)
        with pytest.raises(ConfigError, match=r"^budget_usd: .* spent in all.* a higher --budget-usd goes on"):
            ask(fake, tmp_path, [question()], 0.003, model="another", **PRICE)


# What ends a run


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_key_that_is_refused_in_the_middle_is_told_in_the_servers_words(status, tmp_path):
    wave = [question(n) for n in range(40)]
    with FakeLLM() as fake:
        ask(fake, tmp_path, [])

        async def run():
            async with Client({"explainer": endpoint(fake)}, tmp_path / "cache") as client:
                await client.abilities("explainer")
                fake.faults.extend([None] * 5)
                fake.always = error(status, "this key was revoked")
                return await client.ask_all(wave)

        replies = asyncio.run(run())
        stops = {reply.cut_off for reply in replies if not reply.ok}
        assert stops == {f"the quota is spent, or the key is refused (HTTP {status}: this key was revoked)"}
        assert sum(reply.cut_off == "" for reply in replies) == 5


@pytest.mark.parametrize("fault", [says(Answer(None)), error(400, "too long"), error(404, "no such model")])
def test_a_failure_of_one_question_cuts_nothing_off(fault, tmp_path):
    with FakeLLM(lambda asked: fault if asked.text.endswith(" 3") else "hi") as fake:
        replies, _ = ask(fake, tmp_path, [question(n) for n in range(12)])
    assert [bool(reply.failure) for reply in replies] == [n == 3 for n in range(12)]
    assert {reply.cut_off for reply in replies} == {""}
