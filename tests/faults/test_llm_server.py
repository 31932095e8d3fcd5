"""Rows 23 to 25: what a server can do to a call, and that nothing is lost, repeated without end or guessed."""

import asyncio
import json
import socket

import pytest
from rigs.fake_llm import (
    KEY,
    Answer,
    FakeLLM,
    Fault,
    broken,
    drip,
    dropped,
    endpoint,
    error,
    hang,
    hurry,
    impatient,
    no_choices,
    no_quota,
    rate_limited,
    says,
    truncated,
    web_page,
)

from interp.client.client import Client
from interp.client.remote import limiter
from interp.client.requests import FINAL, RETRYABLE, Chat, Embed, LogProb, Reply
from sae.base.errors import Stopped
from sae.base.progress import Watch

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"p": {"type": "number", "minimum": 0, "maximum": 1}},
        "required": ["p"],
        "additionalProperties": False,
    }
)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    impatient(monkeypatch)


def question(number=0, **asked):
    return Chat("judge", (("user", f"question {number}"),), **{"max_tokens": 50, **asked})


HURRY_S = 0.6


def ask(fake, cache, requests, faults=(), always=None, between=None, patience=None, **changes):
    """Probes, then sets the faults and asks. Returns (replies, calls after the probe, the client)."""

    async def run():
        async with Client({"judge": endpoint(fake, **changes)}, cache / "cache") as client:
            await client.abilities("judge")
            before = len(fake.calls)
            fake.faults.extend(faults)
            fake.always = always
            hurry(client, patience)
            if between:
                between(client)
            return await client.ask_all(requests), fake.calls[before:], client

    return asyncio.run(run())


# Row 23


def test_a_storm_of_too_many_requests_passes_and_nothing_is_lost(tmp_path):
    with FakeLLM(lambda asked: asked.text.upper()) as fake:
        replies, calls, client = ask(
            fake, tmp_path, [question(n) for n in range(60)], [rate_limited()] * 30, max_tries=20
        )
    assert [reply.text for reply in replies] == [f"QUESTION {n}" for n in range(60)]
    assert len(calls) == 90
    assert client.ledger.accounts["judge"].failures == {}


def test_fewer_requests_go_out_at_once_after_a_storm(tmp_path):
    with FakeLLM(lambda asked: Answer("hi", delay_s=0.01)) as fake:
        ask(
            fake,
            tmp_path,
            [question(n) for n in range(30)],
            [rate_limited()] * 10,
            between=lambda client: limits(client),
        )
    assert fake.most_busy <= 8
    assert seen[0] == 8
    assert min(seen) <= 2
    assert seen[-1] > min(seen)


seen: list[float] = []


def limits(client):
    seen.clear()
    shared = next(iter(client._holders.values())).limiter
    enter = shared.enter

    async def noted():
        seen.append(shared.limit)
        started = await enter()
        seen.append(shared.limit)
        return started

    shared.enter = noted


def test_a_pause_that_the_server_asks_for_is_one_for_all(tmp_path, monkeypatch):
    pauses, pause = [], limiter.Limiter._pause
    monkeypatch.setattr(limiter.Limiter, "_pause", lambda self, seconds: pauses.append(seconds) or pause(self, seconds))
    with FakeLLM() as fake:
        _, calls, _ = ask(fake, tmp_path, [question(n) for n in range(20)], [rate_limited("0.4")], max_concurrency=1)
    assert len(calls) == 21
    assert calls[1].at - calls[0].at >= 0.4
    assert pauses == [0.4]


def test_a_server_that_wants_to_be_left_alone_for_long_is(tmp_path):
    with FakeLLM() as fake:
        replies, calls, _ = ask(
            fake, tmp_path, [question(n) for n in range(40)], [rate_limited(1e6)], max_concurrency=1
        )
    assert len(calls) == 1
    assert {reply.failure for reply in replies} == {"rate_limit"}
    assert all("wants to be left alone for 1000000 s" in reply.cut_off for reply in replies)


def test_a_spent_quota_stops_the_endpoint_at_once(tmp_path):
    with FakeLLM() as fake:
        requests = [question(n) for n in range(200)]
        replies, calls, client = ask(fake, tmp_path, requests, [None] * 5, always=no_quota())
        assert len(calls) <= 5 + 8  # those under way
        assert sum(reply.ok for reply in replies) == 5
        failed = [reply for reply in replies if not reply.ok]
        assert {reply.failure for reply in failed} == {"quota"}
        assert "exceeded your current quota" in failed[-1].detail
        assert client.ledger.accounts["judge"].failures == {"quota": 195}
        replies, calls, _ = ask(fake, tmp_path, requests)  # the same again, once it is paid
    assert all(reply.ok for reply in replies)
    assert len(calls) == 195


@pytest.mark.parametrize("status", [500, 502, 503, 529])
def test_a_streak_of_server_errors_is_tried_again(status, tmp_path):
    with FakeLLM() as fake:
        replies, calls, _ = ask(fake, tmp_path, [question()], [broken(status)] * 3)
    assert replies[0].ok
    assert len(calls) == 4


def test_tries_are_bounded(tmp_path):
    with FakeLLM() as fake:
        replies, calls, _ = ask(fake, tmp_path, [question()], always=broken(), max_tries=4)
    assert (replies[0].failure, len(calls)) == ("server_error", 4 + 1)
    assert "hello" in calls[-1].text  # is it the question or the server?
    assert "HTTP 500" in replies[0].cut_off


@pytest.mark.parametrize(
    ("fault", "at_once"), [(broken(), 1), (broken(), 8), (rate_limited(), 8), (dropped(), 8), (hang(), 8)]
)
def test_a_question_that_breaks_its_server_is_alone_in_that(fault, at_once, tmp_path):
    """All tries of some questions are used up, at the end of nothing but such: the server is not given up."""
    with FakeLLM(lambda asked: fault if asked.text[-2:] in (" 2", " 7", " 8", " 9") else "hi") as fake:
        patience = HURRY_S if fault.hangs else None
        wave = [question(n) for n in range(10)]
        replies, _, _ = ask(fake, tmp_path, wave, max_tries=2, max_concurrency=at_once, patience=patience)
        assert [reply.ok for reply in replies] == [n not in (2, 7, 8, 9) for n in range(10)]
        assert {reply.cut_off for reply in replies} == {""}
        assert max(len(fake.asked(f"question {n}")) for n in range(10)) == 2


def test_every_kind_of_call_has_a_small_one_that_tells_if_the_server_is_down(tmp_path):
    asked = [question(schema=SCHEMA), LogProb("reader", "some text", ((0, 4),)), Embed("encoder", ("a text", "b"))]

    async def run():
        roles = dict.fromkeys(("judge", "reader", "encoder"), endpoint(fake, max_tries=1))
        async with Client(roles, tmp_path / "cache") as client:
            for role in roles:
                await client.abilities(role)
            fake.calls.clear()
            found = []
            for request in asked:
                fake.faults.append(broken())
                found.append(await client.ask(request))
            return found, fake.calls

    with FakeLLM() as fake:
        replies, calls = asyncio.run(run())
    assert [(reply.failure, reply.cut_off) for reply in replies] == [("server_error", "")] * 3
    assert [call.path for call in calls] == [
        path for path in ("/chat/completions", "/completions", "/embeddings") for _ in "12"
    ]
    for small in calls[1::2]:
        assert "hello" in small.text
        assert {"response_format", "logprobs", "schema"}.isdisjoint(small.body)


def test_a_server_that_only_fails_is_given_up_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(limiter, "DOWN_S", 0.5)
    with FakeLLM() as fake:
        requests = [question(n) for n in range(300)]
        replies, calls, _ = ask(fake, tmp_path, requests, always=broken(), max_tries=2)
        assert {reply.failure for reply in replies} == {"server_error"}
        assert len(calls) < 60
        assert all("HTTP 500" in reply.cut_off for reply in replies)  # also of those whose tries came to an end
        fake.always = None

        async def later():
            async with Client({"judge": endpoint(fake)}, tmp_path / "cache") as client:
                return await client.ask_all(requests)

        assert all(reply.ok for reply in asyncio.run(later()))


@pytest.mark.parametrize("dead", ["refused", "unknown"])
def test_a_server_that_dies_is_a_reply_and_no_crash(dead, tmp_path, monkeypatch):
    look_up = socket.getaddrinfo

    def no_such_host(host, *arguments, **options):
        if "invalid" in str(host):
            raise socket.gaierror(-2, "Name or service not known")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)

    def gone(client):
        if dead == "refused":
            fake.__exit__()
        else:
            next(iter(client._holders.values())).clients()[0].base_url = "http://no-such-host.invalid/v1"

    with FakeLLM() as fake:
        replies, _, client = ask(fake, tmp_path, [question(n) for n in range(50)], between=gone, max_tries=3)
    assert {reply.failure for reply in replies} == {"connection"}
    assert all(reply.cut_off.startswith("the server does not answer any more (") for reply in replies)
    assert client.ledger.accounts["judge"].failures == {"connection": 50}
    assert client.ledger.accounts["judge"].estimated == 0  # nothing can have been charged


def test_the_work_of_a_dead_server_goes_to_another(tmp_path):
    with FakeLLM(lambda asked: "first") as one, FakeLLM(lambda asked: "second") as two:

        async def run():
            config = endpoint(one, base_urls=(one.url, two.url))
            async with Client({"judge": config}, tmp_path / "cache") as client:
                before = await client.ask_all([question(n) for n in range(40)])
                one.__exit__()
                return before, await client.ask_all([question(n) for n in range(40, 80)])

        before, after = asyncio.run(run())
    assert {reply.text for reply in before} == {"first", "second"}
    assert {reply.text for reply in after} == {"second"}


@pytest.mark.parametrize("fault", [error(404, "no such model"), error(401, "bad key"), error(405, "no")])
def test_one_of_several_addresses_that_is_no_such_server_takes_no_question_from_the_others(fault, tmp_path, caplog):
    with FakeLLM() as good, FakeLLM() as bad:
        bad.always = fault

        async def run():
            config = endpoint(good, base_urls=(good.url, bad.url), max_concurrency=4)
            async with Client({"judge": config}, tmp_path / "cache") as client:
                return await client.ask_all([question(n) for n in range(40)])

        replies = asyncio.run(run())
        assert all(reply.ok for reply in replies)
        assert 0 < len(bad.calls) <= 4
    assert caplog.text.count(f"{bad.url} is left out (HTTP {fault.status}: ") == 1


def test_a_secret_is_not_shown_as_a_server_spells_it(tmp_path):
    with FakeLLM() as fake:
        url = f"{fake.url}?sig=a%2Bb%2Fc%3D%3D&to%20ken=x%20y-z"
        said = error(500, "no: /v1/chat/completions?sig=a%2Bb%2Fc%3D%3D (a+b/c==), x+y-z, x%20y-z, x y-z")
        replies, _, _ = ask(fake, tmp_path, [question()], always=said, max_tries=1, base_urls=(url,))
    assert replies[0].detail.endswith("no: /v1/chat/completions?sig=*** (***), ***, ***, ***")


# Row 24


@pytest.mark.parametrize(
    ("fault", "failure", "calls"),
    [
        (hang(), "timeout", 3),  # with the small question that tells if the server is down
        pytest.param(drip(), "timeout", 3, marks=pytest.mark.slow),
        (dropped(), "connection", 3),
        (web_page(), "server_error", 3),
        (truncated(), "server_error", 3),
        (no_choices(), "server_error", 3),
        (error(400, "context too long"), "bad_request", 1),
        (error(400, "your credit is too low"), "server_error", 2),  # nobody is answered
        (error(413, "too large"), "bad_request", 1),
        (error(404, "no such model"), "server_error", 2),
        (error(400, "filtered", "content_filter"), "refused", 1),
        (error(403, "Your input was flagged"), "refused", 1),
        (error(401, "bad key"), "quota", 1),
        (error(402, "no credits"), "quota", 1),
        (says(Answer(None)), "empty", 1),
        (says(Answer("")), "empty", 1),
        (says(Answer("an ans", finish="length")), "length", 1),
        (says(Answer("x", finish="content_filter")), "refused", 1),
        (says(Answer(None, message={"refusal": "I cannot"})), "refused", 1),
        (says(Answer("<think>but")), "length", 1),
    ],
)
def test_every_way_to_fail_has_its_name(fault, failure, calls, tmp_path):
    with FakeLLM() as fake:
        patience = HURRY_S if failure == "timeout" else None
        replies, made, client = ask(fake, tmp_path, [question()], always=fault, max_tries=2, patience=patience)
        reply = replies[0]
        assert (reply.failure, len(made)) == (failure, calls)
        assert reply.failure in (*RETRYABLE, *FINAL)
        assert len(reply.detail) <= 200
        assert "\n" not in reply.detail
        assert KEY not in str(reply)
        assert client.ledger.accounts["judge"].failures == {failure: 1}
        assert bool(reply.cut_off) == (calls > 1 or failure == "quota")
        # what is final is not asked again, the rest is
        replies, made, _ = ask(fake, tmp_path, [question()])
    assert (replies[0].ok, len(made)) == ((False, 0) if failure in FINAL else (True, 1))


WALL = Fault(403, "<html><title>403 Forbidden</title></html>", content_type="text/html")


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        (WALL, "refused"),
        (error(403, "denied by policy"), "refused"),
        (error(400, "a word that is not allowed"), "bad_request"),
        (error(422, "too many messages"), "bad_request"),
    ],
)
def test_a_text_that_is_refused_is_alone_in_that_and_is_not_sent_again(fault, failure, tmp_path):
    def said(asked):
        return fault if asked.text == "question 3" else "hi"

    with FakeLLM(said) as fake:
        replies, _, _ = ask(fake, tmp_path, [question(n) for n in range(8)])
        again, calls, _ = ask(fake, tmp_path, [question(n) for n in range(8)])
    assert [reply.failure for reply in replies] == [failure if n == 3 else "" for n in range(8)]
    assert {reply.cut_off for reply in replies} == {""}
    assert ([reply.failure for reply in again], calls) == ([reply.failure for reply in replies], [])


@pytest.mark.parametrize("status", [400, 403, 404, 422])
def test_what_is_refused_with_all_others_has_not_failed(status, tmp_path):
    with FakeLLM() as fake:
        replies, calls, _ = ask(
            fake, tmp_path, [question(n) for n in range(20)], always=error(status, "API key not valid")
        )
        assert all(reply.failure in RETRYABLE and "API key not valid" in reply.cut_off for reply in replies)
        assert len(calls) < 20
        replies, _, _ = ask(fake, tmp_path, [question(n) for n in range(20)])
    assert all(reply.ok for reply in replies)


@pytest.mark.parametrize("fault", [hang(), drip(), dropped(), web_page(), truncated(), no_choices(), rate_limited()])
def test_a_fault_that_passes_costs_no_answer(fault, tmp_path):
    patience = HURRY_S if fault.hangs or fault.drip_s else None
    with FakeLLM() as fake:
        replies, calls, _ = ask(fake, tmp_path, [question()], [fault, fault], patience=patience)
    assert replies[0].ok
    assert len(calls) == 3


def test_a_cut_is_normal_where_one_token_is_asked_for(tmp_path):
    with FakeLLM(lambda asked: Answer("yes", {"yes": 0.75, "no": 0.25}, finish="length")) as fake:
        replies, _, _ = ask(fake, tmp_path, [question(max_tokens=1, choices=("yes", "no"))])
    assert replies[0].probabilities == pytest.approx({"yes": 0.75, "no": 0.25})


# Row 25


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        ('Sure: {"p": 0.5}', None, 0.5),
        ('```json\n{"p": 0.25}\n```', None, 0.25),
        ("I think it is likely.", '{"p": 1}', 1),
        ('{"p": "0.5"}', '{"p": 0.5}', 0.5),
        ('{"p": 7}', '{"p": 0.5}', 0.5),
        ('{"p": 0.5} {"p": 0.6}', '{"p": 0.6}', 0.6),
        ('{"q": 0.5}', '{"q": 0.5}', None),
        ("[0.5]", "0.5", None),
    ],
)
def test_an_answer_follows_its_schema_or_is_sent_back_once(first, second, p, tmp_path):
    answers = iter([first, second])
    with FakeLLM(lambda asked: next(answers) if "question" in str(asked.messages) else "hello", schemas=()) as fake:
        replies, calls, _ = ask(fake, tmp_path, [question(schema=SCHEMA)])
        assert len(calls) == (1 if second is None else 2)
        if second is not None:
            (user, told), (assistant, said), (_, complaint) = calls[1].messages
            assert (user, assistant, said) == ("user", "assistant", first)
            assert told == "question 0"
            assert "cannot be used" in complaint
            assert SCHEMA in complaint
        reply = replies[0]
        assert (reply.data["p"] if reply.ok else None) == p
        assert reply.ok or reply.failure == "parse"
        assert reply.tokens_in == 10 * len(calls)
        again, calls, _ = ask(fake, tmp_path, [question(schema=SCHEMA)])
    assert calls == []  # neither the answer nor the repair is paid twice
    assert again[0].cached
    assert again[0].data == reply.data


def test_a_list_of_the_wrong_length_is_no_list(tmp_path):
    entry = {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}
    schema = json.dumps({"type": "array", "items": entry, "minItems": 2, "maxItems": 2})
    with FakeLLM(lambda asked: '[{"id": 1}]', schemas=()) as fake:
        replies, calls, _ = ask(fake, tmp_path, [question(schema=schema)])
    assert (replies[0].failure, len(calls)) == ("parse", 2)
    assert "items 1, not between 2 and 2" in replies[0].detail


def test_vectors_that_are_missing_are_no_vectors(tmp_path):
    short = {"data": [{"index": 0, "embedding": [1.0]}], "usage": {"prompt_tokens": 1}}
    with FakeLLM() as fake:

        async def run():
            async with Client({"encoder": endpoint(fake)}, tmp_path / "cache") as client:
                await client.abilities("encoder")
                fake.faults.append(says(Answer()).__class__(body=short))
                return await client.ask(Embed("encoder", ("a", "b")))

        assert asyncio.run(run()).ok  # the next try


BROKEN = [
    says(Answer("", finish="error")),
    says(Answer("half an ans", finish="error")),
    says(Answer("half an ans", finish="abort")),
    Fault(body={"choices": [{"message": {"content": "half an ans"}, "finish_reason": None}]}),
    Fault(body={"choices": [{"message": {"content": "half"}, "finish_reason": "stop", "error": {"code": 502}}]}),
    Fault(body={"choices": [{"message": {"content": "half"}, "finish_reason": "error", "error": {"code": 400}}]}),
    Fault(body={"choices": [{"error": "upstream died"}]}),
    Fault(body={"choices": [{"message": {"content": "half"}, "finish_reason": "stop"}], "error": {"message": "died"}}),
    Fault(body={"choices": [{"message": "half an ans", "finish_reason": "stop"}]}),
    Fault(body={"choices": [{"finish_reason": "stop"}]}),
    Fault(body={"error": "overloaded"}),
    Fault(body="[" * 100_000),
    Fault(status=204),
]


@pytest.mark.parametrize("fault", BROKEN)
def test_an_error_within_an_answer_is_one_of_the_server(fault, tmp_path):
    with FakeLLM() as fake:
        replies, calls, client = ask(fake, tmp_path, [question()], [fault, fault])
        assert (replies[0].text, len(calls)) == ("hello", 3)
        assert client.ledger.accounts["judge"].failures == {}
        bad, _, _ = ask(fake, tmp_path, [question(1)], always=fault, max_tries=2)
        assert (bad[0].failure, bad[0].text) == ("server_error", "")
        good, calls, _ = ask(fake, tmp_path, [question(1)])  # nothing of it was stored
    assert (good[0].text, len(calls)) == ("hello", 1)


def test_an_error_within_an_answer_of_one_word_is_no_judgement(tmp_path):
    fault = says(Answer("yes", {"yes": 0.9}, finish="error"))
    with FakeLLM(lambda _: Answer("no", {"no": 0.8, "yes": 0.1})) as fake:
        replies, calls, _ = ask(fake, tmp_path, [question(max_tokens=1, choices=("yes", "no"))], [fault])
    assert (replies[0].probabilities["yes"], len(calls)) == (pytest.approx(0.1), 2)


@pytest.mark.parametrize("places", [[0, 0], [0, None], [1, 2], [0]])
def test_vectors_without_a_place_are_asked_for_again_and_never_stored(places, tmp_path):
    data = [{"embedding": [1.0], "index": place} for place in places]
    asked = Embed("encoder", ("a text", "b"))

    async def run(faults, **changes):
        async with Client({"encoder": endpoint(fake, **changes)}, tmp_path / "cache") as client:
            await client.abilities("encoder")
            fake.faults.extend(faults)
            return await client.ask(asked)

    with FakeLLM() as fake:
        assert asyncio.run(run([Fault(body={"data": data})] * 2, max_tries=2)).failure == "server_error"
        fake.faults.clear()
        assert [vector[0] for vector in asyncio.run(run([])).vectors] == [6.0, 1.0]


def test_a_failure_to_read_vectors_that_an_earlier_version_stored_is_asked_again(tmp_path):
    asked = Embed("encoder", ("a text", "b"))

    async def run():
        async with Client({"encoder": endpoint(fake)}, tmp_path / "cache") as client:
            key = client._key(asked, await client.abilities("encoder"))
            await client._cache.keep({key: Reply(failure="parse", detail="2 vectors for 2 texts")})
            return await client.ask(asked)

    with FakeLLM() as fake:
        assert asyncio.run(run()).ok


@pytest.mark.parametrize(
    "header", ["nan", "inf", "-1", "soon", "Mon, 99999999999999999999 Jan 2030 00:00:00 GMT", "\xff"]
)
def test_a_pause_that_is_none_ends_nothing(header, tmp_path):
    with FakeLLM() as fake:
        replies, _, _ = ask(fake, tmp_path, [question()], [error(503, "busy", Retry_After=header)])
    assert replies[0].ok or "wants to be left alone" in replies[0].detail


@pytest.mark.parametrize("to", ["chat/completions", "http://[bad", "ftp://x/v1", "//", "\xff", ""])
@pytest.mark.parametrize("status", [301, 307])
def test_a_redirection_to_nowhere_is_a_reply(status, to, tmp_path):
    with FakeLLM() as fake:
        replies, _, _ = ask(fake, tmp_path, [question()], [Fault(status, "", {"Location": to})] * 30, max_tries=1)
    assert replies[0].failure in RETRYABLE


# Stopping


def test_a_signal_ends_the_wave_once_what_is_under_way_is_stored(tmp_path):
    with FakeLLM(lambda asked: Answer("hi", delay_s=0.05)) as fake:

        async def run(wave):
            stop = lambda: len(fake.asked("question")) >= 20  # noqa: E731
            async with Client({"judge": endpoint(fake)}, tmp_path / "cache", watch=Watch(stop)) as client:
                await client.abilities("judge")
                await client.ask_all(wave)

        wave = [question(n) for n in range(200)]
        with pytest.raises(Stopped):
            asyncio.run(run(wave))
        answered = len(fake.asked("question"))
        assert 20 <= answered < 28  # and those that were under way: at most eight at once
        fake.answer = lambda asked: "hi"
        replies, calls, _ = ask(fake, tmp_path, wave)
    assert all(reply.ok for reply in replies)
    assert len(calls) == 200 - answered


def test_a_signal_does_not_wait_for_a_pause_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr("interp.client.remote.limiter.LONGEST_RETRY_AFTER_S", 1e6)
    with FakeLLM() as fake:
        stop = lambda: bool(fake.asked("question"))  # noqa: E731

        async def run():
            async with Client({"judge": endpoint(fake)}, tmp_path / "cache", watch=Watch(stop)) as client:
                await client.abilities("judge")
                fake.always = rate_limited(1e5)
                await client.ask_all([question(n) for n in range(20)])

        with pytest.raises(Stopped):
            asyncio.run(run())
