"""The probe against servers that do one thing and not another, in silence or with an error."""

import asyncio
import json
from dataclasses import replace

import pytest
from rigs.fake_llm import (
    KEY,
    Answer,
    FakeLLM,
    Fault,
    broken,
    dropped,
    echoed,
    endpoint,
    error,
    impatient,
    no_quota,
    silent,
    web_page,
)

from interp.client.cache import Cache
from interp.client.client import Client
from interp.client.remote.abilities import QUIET
from interp.client.requests import Abilities, Chat, Embed, LogProb
from sae.base.errors import ConfigError

SCHEMA = json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    impatient(monkeypatch)


def probe(server, cache, role="judge", **changes):
    async def run():
        async with Client({role: endpoint(server, **changes)}, cache) as client:
            return await client.abilities(role)

    return asyncio.run(run())


def talk(asked):
    if "Count" in asked.text:
        return Answer(" ".join(map(str, range(1, 101))), usage=(9, 100))
    return Answer("Yes", {"Yes": 0.7, "No": 0.2}) if "fire" in asked.text else "hello"


FULL = Abilities(choices=True, structured="json_schema", prompt_logprobs=True, prompt_top=20)


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ({}, {}),
        ({"logprobs": 0}, {"choices": False}),
        ({"logprobs": 5}, {}),
        ({"schemas": ("json_object_schema", "json_object")}, {"structured": "json_object_schema"}),
        ({"schemas": ("json_object",)}, {"structured": "json_object"}),
        ({"schemas": ()}, {"structured": "plain"}),
        ({"limits": ("max_completion_tokens",)}, {"limit_name": "max_completion_tokens"}),  # the other is refused
        ({"limits": ("max_completion_tokens", "x")}, {"limit_name": "max_completion_tokens"}),  # the other is ignored
        ({"temperature": False}, {"temperature": False}),
        (
            {"limits": ("max_completion_tokens",), "temperature": False},
            {"limit_name": "max_completion_tokens", "temperature": False},
        ),
        ({"system": False}, {"system": False}),
        ({"echo": silent}, {"prompt_logprobs": False, "prompt_top": 0}),
        ({"thinks": "inline"}, {"choices": False, "thinking_tokens": 2048}),
        ({"thinks": "field"}, {"choices": False, "thinking_tokens": 2048}),
        ({"thinks": "field", "quiet": "enable_thinking"}, {"quiet": json.dumps(QUIET[0])}),
        ({"thinks": "inline", "quiet": "reasoning_effort"}, {"quiet": json.dumps(QUIET[1])}),
    ],
)
def test_what_a_server_does_is_found_out(server, expected, tmp_path):
    with FakeLLM(talk, **server) as fake:
        found = probe(fake, tmp_path / "cache")
    assert found == Abilities(**{**vars(FULL), **expected})


def test_room_for_thought_is_what_was_set(tmp_path):
    with FakeLLM(talk, thinks="inline", quiet="enable_thinking") as fake:
        assert probe(fake, tmp_path / "cache", thinking_tokens=300).thinking_tokens == 300


def pensive(asked):
    """Thinks, its opening mark in the prompt: nothing shows it before the end of the thought."""
    return Answer("okay so " * 40 + "</think> blue", {"okay": 0.9, "yes": 0.05})


def test_room_for_thought_is_kept_where_a_short_answer_shows_no_thinking(tmp_path):
    asked = Chat("judge", (("user", "Which color?"),), 50)
    with FakeLLM(pensive) as fake:

        async def run(room):
            async with Client({"judge": endpoint(fake, thinking_tokens=room)}, tmp_path / "cache") as client:
                return await client.abilities("judge"), await client.ask(asked)

        able, reply = asyncio.run(run(300))
        assert (able.thinking_tokens, able.choices) == (300, False)  # its first token is no answer
        assert reply.text == "blue"
        without = asyncio.run(run(0))[1]
    assert without.failure == "length"
    assert "thinking_tokens" in without.detail


def test_room_for_thought_costs_no_probabilities_where_the_first_token_answers(tmp_path):
    with FakeLLM(talk) as fake:
        assert probe(fake, tmp_path / "cache", thinking_tokens=300) == Abilities(
            **{**vars(FULL), "thinking_tokens": 300}
        )


def test_room_for_thought_that_was_dropped_earlier_is_found_again(tmp_path):
    async def remembered():
        cache = Cache(tmp_path / "cache")
        await cache.note({f"abilities {fake.url} fake judge 300": vars(Abilities())})
        cache.close()

    with FakeLLM(pensive) as fake:
        asyncio.run(remembered())
        assert probe(fake, tmp_path / "cache", thinking_tokens=300).thinking_tokens == 300


@pytest.mark.parametrize(
    "said",
    [
        Answer("so 1 </think> 1 2 3"),
        Answer("\u25c1think\u25b7 I count"),
        Answer("<|channel|>analysis<|message|>I count"),
        Answer(
            "1 2", message={"content": [{"type": "thinking", "thinking": "I count"}, {"type": "text", "text": "1"}]}
        ),
        Answer("1 2", message={"reasoning_details": [{"type": "reasoning.text", "text": "I count"}]}),
        Answer(None, finish="length"),
    ],
)
def test_every_sign_of_thinking_gives_it_room(said, tmp_path):
    with FakeLLM(lambda asked: said if "Count" in asked.text else talk(asked)) as fake:
        found = probe(fake, tmp_path / "cache")
    assert (found.thinking_tokens, found.choices) == (2048, False)


def test_a_temperature_that_is_taken_stays_where_a_limit_is_ignored(tmp_path):
    def talks(asked):  # without a temperature it happens to be brief
        return "1" if "temperature" not in asked.body else talk(asked)

    with FakeLLM(talks, limits=("x", "y")) as fake:
        assert probe(fake, tmp_path / "cache").temperature


def test_an_end_that_is_never_told_is_not_waited_for(tmp_path):
    with FakeLLM(lambda asked: Answer("1 2 3", finish=None) if "Count" in asked.text else "hello") as fake:
        assert not probe(fake, tmp_path / "cache").ends


def test_it_is_asked_once_and_remembered(tmp_path):
    with FakeLLM(talk) as fake:
        first = probe(fake, tmp_path / "cache")
        calls = len(fake.calls)
        assert calls <= 12
        assert probe(fake, tmp_path / "cache") == first
        assert len(fake.calls) == calls
        assert probe(fake, tmp_path / "cache", model="other") == first
        assert len(fake.calls) == 2 * calls


def shifted(text, top):
    """Log-probabilities of the token after, as llama-cpp-python returns them for some models."""
    body = echoed(text, top)
    told = body["choices"][0]["logprobs"]
    told["token_logprobs"] = [None, *(-9.0 for _ in told["tokens"][1:])]
    return body


def test_log_probabilities_of_other_tokens_are_not_believed(tmp_path):
    with FakeLLM(talk, echo=shifted) as fake:
        assert not probe(fake, tmp_path / "cache", "reader").prompt_logprobs


def test_a_client_error_told_as_one_of_the_server_is_a_finding(tmp_path):
    def talks(asked):  # as llama-cpp-python answers a response format that it does not know
        return broken(500) if "response_format" in asked.body else talk(asked)

    with FakeLLM(talks) as fake:
        assert probe(fake, tmp_path / "cache") == replace(FULL, structured="plain")


def format_(asked):
    return "response_format" in asked.body


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (format_, {"structured": "plain"}),
        (lambda asked: (asked.body.get("response_format") or {}).get("type") == "json_schema", {"structured": "plain"}),
        (lambda asked: "top_logprobs" in asked.body, {"choices": False}),
        (lambda asked: asked.body.get("top_logprobs", 0) > 5, {"top": 5}),
        (lambda asked: "temperature" in asked.body, {"temperature": False}),
        (
            lambda asked: "max_tokens" in asked.body and "messages" in asked.body,
            {"limit_name": "max_completion_tokens"},
        ),
        (lambda asked: any(role == "system" for role, _ in asked.messages), {"system": False}),
        (lambda asked: asked.path == "/completions", {"prompt_logprobs": False, "prompt_top": 0}),
        (lambda asked: asked.body.get("logprobs") == 20, {"prompt_top": 5}),
    ],
)
@pytest.mark.parametrize("status", [400, 403, 404, 406, 418, 422, 451, 500, 501])
def test_a_field_that_is_refused_is_left_out_whatever_the_status(status, field, expected, tmp_path):
    with FakeLLM(talk, denies=lambda asked: error(status, "not for you") if field(asked) else None) as fake:
        assert probe(fake, tmp_path / "cache") == Abilities(**{**vars(FULL), **expected})
        fake.calls.clear()

        async def run():
            async with Client({"judge": endpoint(fake)}, tmp_path / "cache") as client:
                return await client.ask(Chat("judge", (("user", "give n"),), 50, schema=SCHEMA))

        assert "does not" not in asyncio.run(run()).detail
        assert len(fake.calls) > 0  # the endpoint is not closed


@pytest.mark.parametrize(
    "fault", [error(502, "provider error"), error(503, "no provider takes it"), web_page(), dropped()]
)
def test_an_error_that_stays_while_others_are_answered_is_a_finding(fault, tmp_path):
    with FakeLLM(talk, denies=lambda asked: fault if format_(asked) else None) as fake:
        assert probe(fake, tmp_path / "cache", "explainer").structured == "plain"


@pytest.mark.parametrize(
    "fault", [error(401, "bad key"), error(402, "no credits"), no_quota(), error(429, "slow down")]
)
def test_a_refused_key_or_a_storm_is_no_finding(fault, tmp_path):
    with FakeLLM(talk, denies=lambda asked: fault if format_(asked) else None) as fake:
        assert probe(fake, tmp_path / "well", "reader").prompt_logprobs
        with pytest.raises(ConfigError, match="does not answer"):
            probe(fake, tmp_path / "cache")


@pytest.mark.parametrize("status", [403, 451])
def test_a_reader_whose_field_is_refused_is_told_from_one_whose_key_is(status, tmp_path):
    def denies(asked):
        return error(status, "not for you") if asked.body.get("echo") or everything else None

    everything = False
    with FakeLLM(talk, denies=denies) as fake:
        assert not probe(fake, tmp_path / "field", "reader").prompt_logprobs
        fake.denies = lambda asked: error(status, "not for you") if asked.path == "/completions" else None
        assert not probe(fake, tmp_path / "path", "reader").prompt_logprobs
        fake.denies, everything = denies, True
        with pytest.raises(ConfigError, match=f"HTTP {status}: not for you"):
            probe(fake, tmp_path / "key", "reader")


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}],
        [{"embedding": [1.0]}],
        [{"embedding": None}, {"embedding": None}],
        ["a", "b"],
    ],
)
def test_an_encoder_whose_vectors_cannot_be_read_is_told_before_any_work(data, tmp_path):
    told = r"^encoder: .* does not answer \(the server's answer cannot be used: "
    with FakeLLM(denies=lambda _: Fault(body={"data": data})) as fake, pytest.raises(ConfigError, match=told):
        probe(fake, tmp_path / "cache", "encoder")


def test_no_optional_field_is_sent_for_vectors(tmp_path):
    with FakeLLM() as fake:
        probe(fake, tmp_path / "cache", "encoder")
    assert {tuple(call.body) for call in fake.calls} == {("model", "input")}


def test_a_passing_trouble_is_no_finding(tmp_path):
    with FakeLLM(talk) as fake:
        fake.faults.extend([error(503, "starting"), error(429, "slow"), *[None] * 4, error(503, "busy"), web_page()])
        assert probe(fake, tmp_path / "cache") == FULL


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (error(401, f"Incorrect API key provided: {KEY}"), "HTTP 401"),
        (error(404, "model 'fake' not found"), "model 'fake' not found"),
        (error(400, "no such model"), "no such model"),
        (error(503, "busy"), "HTTP 503"),
        (no_quota(), "current quota"),
        (web_page(), "/v1"),
    ],
)
@pytest.mark.parametrize("role", ["judge", "explainer", "encoder", "reader"])
def test_a_server_that_cannot_be_asked_is_an_error_of_one_line(fault, told, role, tmp_path):
    with FakeLLM(talk) as fake:
        fake.always = fault
        with pytest.raises(ConfigError) as caught:
            probe(fake, tmp_path / "cache", role)
    message = str(caught.value)
    assert message.startswith(f"{role}: ")
    assert fake.url in message
    assert told in message
    assert "\n" not in message
    assert KEY not in message


@pytest.mark.parametrize("role", ["judge", "reader"])
@pytest.mark.parametrize("fault", [error(404, "page not found"), Fault(200, {"error": "Unexpected endpoint"})])
@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("", r"; most servers want http://127\.0\.0\.1:\d+/v1$"),
        ("/", r"; most servers want http://127\.0\.0\.1:\d+/v1$"),
        ("/v1/chat/completions", "; an address ends before /chat/completions, which is added to it$"),
        ("/openai/deployments/gpt", r"; Azure wants the version of its protocol too: http:\S+gpt\?api-version=\.\.\.$"),
        ("/v1", r"\)$"),
    ],
)
def test_an_address_that_lacks_something_is_told_with_it(typed, told, fault, role, tmp_path):
    with FakeLLM(talk) as fake:
        fake.always = fault
        with pytest.raises(ConfigError, match=told):
            probe(fake, tmp_path / "cache", role, base_urls=(fake.url.removesuffix("/v1") + typed,))


def test_a_dead_server_is_an_error_before_any_work(tmp_path):
    with FakeLLM() as fake:
        pass
    with pytest.raises(ConfigError, match=f"judge: the model 'fake' at {fake.url} does not answer"):
        probe(fake, tmp_path / "cache")


def test_a_base_model_can_be_a_reader(tmp_path):
    with FakeLLM(lambda asked: error(400, "no chat template")) as fake:
        assert probe(fake, tmp_path / "cache", "reader").prompt_logprobs


def test_what_a_server_cannot_do_is_not_asked(tmp_path):
    with FakeLLM(talk, logprobs=0, echo=silent) as fake:

        async def run():
            async with Client({"judge": endpoint(fake)}, tmp_path / "cache") as client:
                await client.abilities("judge")
                calls = len(fake.calls)
                asked = [
                    Chat("judge", (("user", "fire?"),), 1, choices=("yes", "no")),
                    LogProb("judge", "a text", ((0, 3),)),
                ]
                replies = await client.ask_all(asked)
                assert len(fake.calls) == calls
                return replies

        assert [reply.failure for reply in asyncio.run(run())] == ["unsupported"] * 2


def test_every_kind_of_request_is_answered(tmp_path):
    asked = [
        Chat("judge", (("system", "s"), ("user", "is fire hot?")), 1, choices=("yes", "no")),
        Chat("judge", (("user", "give n"),), 50, schema=SCHEMA),
        Chat("explainer", (("user", "hi"),), 50, temperature=1.0, sample=3),
        LogProb("reader", "one two three", ((0, 7), (7, 13))),
        LogProb("reader", "one two three", ((4, 7),), choices=("0", "9")),
        Embed("encoder", ("abc", "aa")),
    ]
    with FakeLLM(talk) as fake:

        async def run():
            roles = dict.fromkeys(("judge", "explainer", "reader", "encoder"), endpoint(fake))
            async with Client(roles, tmp_path / "cache") as client:
                return await client.ask_all(asked), await client.ask_all(asked)

        first, second = asyncio.run(run())
    chosen, parsed, said, read, levels, embedded = first
    assert chosen.probabilities == pytest.approx({"yes": 0.7, "no": 0.2})
    assert parsed.data == {"n": 0}
    assert said.text == "hello"
    assert read.logprobs == (pytest.approx((-0.04,)), pytest.approx((-0.06,)))
    assert read.counts == (1, 1)
    assert [round(2.718281828**value, 4) for value in levels.logprobs[0]] == [0.01, 0.1]
    assert embedded.vectors[1] == pytest.approx((2.0, 2.0, 0.1))
    assert all(reply.ok and not reply.cached for reply in first)
    assert [vars(reply) | {"cached": False} for reply in second] == [vars(reply) for reply in first]
    assert all(reply.cached for reply in second)
