"""Whatever stands at any place of whatever a server says, a question gets a reply, and what is kept can be used."""

import asyncio
import copy
import json
import math
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rigs.fake_llm import Answer, FakeLLM, Fault, endpoint, impatient

from interp.client.client import Client
from interp.client.requests import FINAL, RETRYABLE, Chat, Embed, LogProb
from sae.base.errors import ConfigError

SCHEMA = json.dumps({"type": "object", "properties": {"p": {"type": "number"}}, "required": ["p"]})
QUESTIONS = {
    "text": Chat("judge", (("user", "say"),), 50),
    "json": Chat("judge", (("user", "give p"),), 50, schema=SCHEMA),
    "word": Chat("judge", (("user", "is it?"),), 1, choices=("yes", "no")),
    "spans": LogProb("judge", "one two three", ((0, 7), (7, 13))),
    "levels": LogProb("judge", "one two three", ((4, 7),), choices=("0", "9")),
    "vectors": Embed("encoder", ("abc", "aa")),
}
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
GONE = object()
JUNK = [
    *(None, True, False, [], {}, "", "text", "stop", "error", "\ud83d", "\0", "9" * 400, DEEP, GONE),
    *(0, 1, -1, 0.5, -0.5, 10**30, 10**400, -(10**400), 1e300, -1e300, math.nan, math.inf, -math.inf),
    *([None], [[1]], ["x", 1], [{}], {"a": None}, {"code": 429}, {"code": 10**30, "message": ["x"]}, [{"text": [1]}]),
]


def places(value, at=()):
    """Yields the way to every place of a JSON value, the whole among them."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, held in inner:
        yield from places(held, (*at, name))


def changed(value, at, junk):
    """The value with something else at a place, or without it."""
    if not at:
        return None if junk is GONE else junk
    value = copy.deepcopy(value)
    holder = value
    for name in at[:-1]:
        holder = holder[name]
    if junk is GONE:
        del holder[at[-1]]
    else:
        holder[at[-1]] = junk
    return value


TWISTS = st.lists(st.tuples(st.integers(0, 2**16), st.sampled_from(JUNK)), min_size=1, max_size=2)


def twisted(value, twists):
    """The value with something else at one or two of its places."""
    for number, junk in twists:
        found = list(places(value))
        value = changed(value, found[number % len(found)], junk)
    return value


def fuzz(examples):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


def talk(asked):
    if "p" in str(asked.body.get("response_format")):
        return Answer('{"p": 0.5}', message={"reasoning_content": "well"})
    return Answer("Yes", {"Yes": 0.7, "No": 0.2}) if asked.body.get("logprobs") else "hello"


def usable(request, reply):
    assert reply.failure in ("", *RETRYABLE, *FINAL)
    assert len(reply.detail.encode()) <= 4 * 200
    reply.text.encode()
    if not reply.ok:
        return
    if isinstance(request, Embed):
        assert len(reply.vectors) == len(request.texts)
        assert all(map(math.isfinite, sum(reply.vectors, ())))
    elif isinstance(request, LogProb):
        assert len(reply.logprobs) == len(request.spans)
        assert all(value <= 0.1 for row in reply.logprobs for value in row)
    elif request.choices:
        assert set(reply.probabilities) == set(request.choices)
        assert all(0 <= p < 2 for p in reply.probabilities.values())
    elif request.schema:
        assert math.isfinite(reply.data["p"])
    else:
        assert reply.text


@contextmanager
def asking(folder, monkeypatch, **changes):
    """A server and a way to ask it a question, its answer changed; one client for all of them."""
    impatient(monkeypatch)
    roles = ("judge", "encoder")
    with FakeLLM(talk) as fake, asyncio.Runner() as runner:
        client = Client(dict.fromkeys(roles, endpoint(fake, max_tries=1, **changes)), folder / "cache", poll_s=0.001)
        runner.run(client.__aenter__())
        for role in roles:
            runner.run(client.abilities(role))
        number = iter(range(10**6))

        def ask(request, fault):
            fake.faults.clear()
            fake.faults.append(fault)
            if isinstance(request, Chat):
                request = Chat(**{**vars(request), "sample": next(number)})
            elif isinstance(request, Embed):
                request = Embed(request.role, (f"abc {next(number)}", "aa"))
            else:
                at = next(number)
                more = tuple((4 + at // 9**power % 9, 13) for power in range(4))
                request = LogProb(request.role, request.text, (*request.spans, *more), request.choices)
            reply = runner.run(client.ask(request))
            usable(request, reply)
            counted = client.ledger.accounts[request.role]
            assert 0 <= counted.tokens_in < 10**16
            return reply

        try:
            yield fake, ask
        finally:
            runner.run(client.__aexit__())


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUESTIONS)
def test_any_answer_amounts_to_a_reply(kind, tmp_path, monkeypatch):
    with asking(tmp_path, monkeypatch) as (fake, ask):
        assert ask(QUESTIONS[kind], None).ok
        asked = next(call for call in reversed(fake.calls))
        whole = fake.answered(asked, None if asked.path != "/chat/completions" else talk(asked))

        @fuzz(120)
        @given(TWISTS)
        def check(twists):
            ask(QUESTIONS[kind], Fault(body=json.dumps(twisted(whole, twists))))

        check()


ERROR = {"error": {"message": "no", "type": "error", "code": 0, "param": None, "metadata": {"raw": "x"}}}
ERRORS = [ERROR, [ERROR], {"detail": [{"loc": ["body", "x"], "msg": "no"}]}, {"message": "no", "code": 7}]
STATUSES = [200, 204, 300, 304, 400, 404, 422, 429, 500, 503, 599]


@pytest.mark.slow
def test_any_error_amounts_to_a_reply(tmp_path, monkeypatch):
    with asking(tmp_path, monkeypatch) as (_, ask):

        @fuzz(200)
        @given(st.sampled_from(ERRORS), TWISTS, st.sampled_from(STATUSES))
        def check(body, twists, status):
            assert not ask(QUESTIONS["text"], Fault(status, json.dumps(twisted(body, twists)))).ok

        check()


KINDS = ["application/json", "text/html", "text/plain; charset=utf-16", "text/plain; charset=rot13", "", "\xff"]


def test_bytes_of_any_kind_amount_to_a_reply(tmp_path, monkeypatch):
    with asking(tmp_path, monkeypatch) as (_, ask):

        @fuzz(150)
        @given(st.binary(max_size=60), st.sampled_from(KINDS), st.sampled_from([200, 400, 500]), st.booleans())
        def check(raw, kind, status, packed):
            headers = {"Content-Encoding": "gzip"} if packed else {}
            assert not ask(QUESTIONS["text"], Fault(status, raw, headers, content_type=kind)).ok

        check()


@pytest.mark.slow
def test_any_answer_to_a_probe_is_a_finding_or_an_error_of_one_line(tmp_path, monkeypatch):
    impatient(monkeypatch)
    number = iter(range(10**6))

    async def probe(fake, role):
        async with Client({role: endpoint(fake)}, tmp_path / str(next(number))) as client:
            return await client.abilities(role)

    with FakeLLM(talk) as fake:

        @fuzz(40)
        @given(st.lists(TWISTS, max_size=12), st.sampled_from(["judge", "encoder", "reader"]))
        def check(several, role):
            fake.twists.clear()
            fake.twists.extend(partial(twisted, twists=twists) for twists in several)
            try:
                found = asyncio.run(probe(fake, role))
            except ConfigError as error:
                found = str(error)
            assert "\n" not in str(found)

        check()


@pytest.mark.slow
def test_anything_that_a_batch_says_leaves_each_question_a_reply(tmp_path, monkeypatch):
    impatient(monkeypatch)
    number, of_lines = iter(range(10**6)), []

    def script(made):
        if made.status != "in_progress":
            return
        made.finish(fail=lambda name: 400 if name[0] in "01" else 0)
        for name in filter(None, (made.output_file_id, made.error_file_id)):
            lines = [json.loads(line) for line in fake.files[name].splitlines()]
            lines = [twisted(line, of_lines.pop()) if of_lines else line for line in lines]
            fake.files[name] = "\n".join(map(json.dumps, lines)).encode()

    async def wave(objects):
        config, n = endpoint(fake, via="batch", max_tries=2), next(number)
        async with Client({"judge": config, "encoder": config}, tmp_path / "cache", poll_s=0.001) as client:
            await client.abilities("judge")
            await client.abilities("encoder")
            fake.twists.extend(partial(twisted, twists=twists) for twists in objects)
            asked = [Chat("judge", (("user", f"say {n} {m}"),), 50) for m in range(3)]
            asked.append(Embed("encoder", (f"text {n}", "b")))
            return zip(asked, await client.ask_all(asked), strict=True)

    with FakeLLM(talk, batch_script=script) as fake:

        @fuzz(40)
        @given(st.lists(TWISTS, max_size=4), st.lists(TWISTS, max_size=4))
        def check(lines, objects):
            fake.twists.clear()
            fake.batches.clear()
            of_lines[:] = lines
            for request, reply in asyncio.run(wave(objects)):
                usable(request, reply)

        check()
