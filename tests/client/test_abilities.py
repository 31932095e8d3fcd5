"""The probe against servers that do one thing and not another, in silence or with an error."""

import asyncio
import json

import pytest
from rigs.fake_llm import KEY, Answer, FakeLLM, broken, echoed, endpoint, error, impatient, no_quota, silent, web_page

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
        assert probe(fake, tmp_path / "cache") == Abilities(**{**vars(FULL), "structured": "plain"})


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
    if role == "reader" and fault.status in (400, 404):
        return  # no completions: it is a finding
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
