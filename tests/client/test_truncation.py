"""A prompt that a server cut without a word is told by its count of tokens, and a whole one never is."""

import asyncio
from pathlib import Path

import pytest
from rigs.fake_llm import Answer, FakeLLM, endpoint

from interp.client.client import Client
from interp.client.remote.truncation import LEAST_CONTEXT, cut, least_tokens
from interp.client.requests import Chat, Embed, LogProb

WORDS = "the quick brown fox jumps " * 400


def ask(tmp_path: Path, request, usage, **changes):
    async def run():
        async with Client({"explainer": endpoint(fake, **changes)}, tmp_path / "cache", poll_s=0.01) as client:
            return (await client.ask_all([request]))[0]

    with FakeLLM(lambda asked: Answer("hello", usage=usage(asked))) as fake:
        return asyncio.run(run())


@pytest.mark.parametrize("via", ["http", "batch"])
def test_an_answer_to_half_a_question_is_an_error_of_that_question(tmp_path, monkeypatch, via):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    request = Chat("explainer", (("system", "Explain."), ("user", WORDS)), 50)
    reply = ask(tmp_path, request, lambda asked: (min(1024, 2 * len(asked.text.split())), 2), via=via)
    assert reply.failure == "bad_request"
    assert "read 1,024 tokens of a prompt of at least 2,002" in reply.detail
    assert ask(tmp_path / "whole", request, lambda asked: (len(asked.text.split()) * 5 // 4, 2), via=via).ok


@pytest.mark.parametrize("request_", [LogProb("reader", WORDS, ((0, 5),)), Embed("encoder", (WORDS,) * 2)])
def test_other_questions_are_counted_too(request_):
    assert cut(request_, {"usage": {"prompt_tokens": 512}})
    assert not cut(request_, {"usage": {"prompt_tokens": 5000}})


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": 0},
        {"prompt_tokens": None},
        {"prompt_tokens": LEAST_CONTEXT - 1},  # what is new of a prompt whose beginning was kept
        {"prompt_tokens": 200, "prompt_tokens_details": {"cached_tokens": 1900}},
        {"prompt_tokens": 200, "cache_read_input_tokens": 900, "cache_creation_input_tokens": 1000},
        {"prompt_tokens": 2048, "prompt_tokens_details": None},
        {"prompt_tokens": 2048, "prompt_tokens_details": []},
    ],
)
def test_what_a_server_does_not_say_is_no_error(usage):
    request = Chat("judge", (("user", WORDS),), 50)
    assert cut(request, {"usage": usage}) == ""


def test_real_tokenizers_need_more_than_the_least():
    """The bundled model's own tokenizer, one of a byte a token, and texts of every kind."""
    from sae.lm.files import load_tokenizer

    tokenizer = load_tokenizer("quickstart")
    pages = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")]
    others = [
        "\u6211\u559c\u6b22\u5403\u82f9\u679c\u3002" * 50,
        "\u0e01\u0e34\u0e19\u0e02\u0e49\u0e32\u0e27" * 50,
        "\u043f\u0440\u0438\u0432\u0435\u0442 " * 50,
        "=" * 500,
    ]
    for text in (*pages, *others, WORDS):
        assert least_tokens(text) <= len(tokenizer(text)["input_ids"])
        assert least_tokens(text) <= len(text.encode())
