"""What a server's JSON is read as: choices, spans, thoughts, JSON of a schema; and what is sent."""

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.client import answers, bodies, schema, spans
from interp.client.requests import Abilities, Chat, Embed, LogProb, cache_key

POINT = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 3},
        "p": {"type": "number", "minimum": 0, "maximum": 1},
        "word": {"type": "string", "enum": ["yes", "no"]},
    },
    "required": ["id", "p"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": POINT, "minItems": 2, "maxItems": 2}


@pytest.mark.parametrize(
    ("token", "choices", "expected"),
    [
        ("yes", ("yes", "no"), "yes"),
        (" Yes", ("yes", "no"), "yes"),
        ("\u2581NO", ("yes", "no"), "no"),
        ("\u0120n", ("yes", "no"), "no"),
        ("y", ("yes", "no"), "yes"),
        ("n", ("no", "not"), None),
        ("no", ("no", "not"), "no"),
        ("1", ("1", "10"), "1"),
        ("10", ("1", "10"), "10"),
        ("yes.", ("yes", "no"), None),
        ("maybe", ("yes", "no"), None),
        (" ", ("yes", "no"), None),
        ("A", ("a", "b"), "a"),
    ],
)
def test_a_token_speaks_for_the_word_that_it_begins(token, choices, expected):
    assert answers.choice_of(token, choices) == expected


@given(
    st.text(max_size=4),
    st.lists(st.text(st.characters(codec="ascii"), min_size=1, max_size=3), max_size=6, unique=True),
)
def test_no_token_speaks_for_two_words(token, words):
    found = answers.choice_of(token, words)
    assert found is None or found.lower().startswith(token.lstrip(answers._LEADING).lower())


def chat(body, **asked):
    request = Chat("judge", (("user", "?"),), **{"max_tokens": 5, **asked})
    return answers.read(request, Abilities(choices=True), {"choices": [body]})


def first_token(*pairs):
    listed = [{"token": token, "logprob": math.log(p)} for token, p in pairs]
    return {"logprobs": {"content": [{**listed[0], "top_logprobs": listed[1:]}]}, "message": {"content": None}}


def test_probabilities_of_choices_are_summed_over_the_tokens_that_speak_for_them():
    body = first_token(("Yes", 0.4), ("Yes", 0.4), (" yes", 0.2), ("No", 0.1), ("Well", 0.05), ("n", 0.02))
    reply = chat(body | {"finish_reason": "length"}, choices=("yes", "no", "unsure"))
    assert reply.ok
    assert reply.probabilities == pytest.approx({"yes": 0.6, "no": 0.12, "unsure": 0.0})


def test_a_token_that_is_no_number_counts_for_nothing():
    body = first_token(("yes", 0.4), ("no", 0.4))
    body["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = math.nan
    assert chat(body, choices=("yes", "no")).probabilities == pytest.approx({"yes": 0.4, "no": 0.0})


@pytest.mark.parametrize(
    ("message", "finish", "failure", "text"),
    [
        ({"content": "an answer"}, "stop", "", "an answer"),
        ({"content": "<think>hm</think>\n\nan answer"}, "stop", "", "an answer"),
        ({"content": "<think>hm <think> more", "reasoning_content": "x"}, "stop", "length", ""),
        ({"content": "an answer", "reasoning_content": "secret"}, "stop", "", "an answer"),
        ({"content": "an ans"}, "length", "length", "an ans"),
        ({"content": None}, "stop", "empty", ""),
        ({"content": "  "}, "stop", "empty", ""),
        ({"content": [{"type": "text"}]}, "stop", "empty", ""),
        ({"content": "x", "refusal": "I cannot"}, "stop", "refused", ""),
        ({"content": "x"}, "content_filter", "refused", ""),
        ({"content": "it says </think> here"}, "stop", "", "it says </think> here"),
        ({"content": "half \ud83d one"}, "stop", "", "half ? one"),
        ({"content": [{"type": "text", "text": "an "}, {"type": "text", "text": "answer"}]}, "stop", "", "an answer"),
        (
            {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "an answer"}]},
            "stop",
            "",
            "an answer",
        ),
        ({"content": [{"type": "refusal", "refusal": "I cannot"}]}, "stop", "refused", ""),
        ({"content": "an ans"}, "max_tokens", "length", "an ans"),
        ({"content": "an ans"}, "MAX_TOKENS", "length", "an ans"),
        ({"content": "an ans"}, "SAFETY", "refused", ""),
        ({"content": "an ans"}, "content_filter: RECITATION", "refused", ""),
        (None, "content_filter", "refused", ""),
        (None, "length", "length", ""),
        (None, "stop", "server_error", ""),
        ({"content": "an answer"}, "end_turn", "", "an answer"),
        ({"content": ""}, "error", "server_error", ""),
        ({"content": "an ans"}, "error", "server_error", ""),
        ({"content": "an ans"}, "abort", "server_error", ""),
        ({"content": "an ans"}, "insufficient_system_resource", "server_error", ""),
        ({"content": "an ans"}, None, "server_error", ""),
        ({"content": 5}, "stop", "server_error", ""),
        ("an answer", "stop", "server_error", ""),
    ],
)
def test_what_an_answer_amounts_to(message, finish, failure, text):
    reply = chat({"message": message, "finish_reason": finish})
    assert (reply.failure, reply.text) == (failure, text)


def test_an_answer_beside_an_error_is_none():
    body = {"message": {"content": "an ans"}, "finish_reason": "stop", "error": {"code": 502, "message": "upstream"}}
    assert chat(body).failure == "server_error"
    probable = first_token(("yes", 0.4)) | {"finish_reason": "error"}
    assert chat(probable, choices=("yes", "no")).failure == "server_error"


def test_an_answer_without_an_end_is_one_where_no_answer_tells_its_end():
    body = {"choices": [{"message": {"content": "an answer"}, "finish_reason": None}]}
    assert answers.read(Chat("judge", (("user", "?"),), 5), Abilities(ends=False), body).text == "an answer"
    del body["choices"][0]["finish_reason"]
    assert answers.read(Chat("judge", (("user", "?"),), 5), Abilities(), body).text == "an answer"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "reasoning_details"])
def test_an_answer_that_is_only_thought_is_told_as_that(field):
    def detail(text, **asked):
        held = [{"type": "reasoning.text", "text": text}] if field == "reasoning_details" else text
        reply = chat({"message": {"content": None, field: held}, "finish_reason": "stop"}, **asked)
        assert reply.failure == "empty"
        return reply.detail

    told = detail('{"id": 1, "p": 0.5}', schema=json.dumps(POINT))
    assert told.endswith(f"the JSON that was asked for stands in {field}: the server takes the answer for thinking")
    assert f"only {field} holds text" in detail("hm", schema=json.dumps(POINT))
    assert f"only {field} holds text" in detail("hm")


def test_an_answer_that_is_cut_tells_what_gives_it_room():
    body = {"choices": [{"message": {"content": "well"}, "finish_reason": "length"}]}
    for room, told in ((0, "thinking_tokens, if the model thinks first"), (300, "more than 300 thinking_tokens")):
        assert told in answers.read(Chat("judge", (("user", "?"),), 5), Abilities(thinking_tokens=room), body).detail


def test_what_is_no_log_probability_counts_for_nothing():
    body = first_token(("yes", 0.4), ("no", 0.4))
    body["logprobs"]["content"][0]["logprob"] = 0.4  # a probability
    assert chat(body, choices=("yes", "no")).probabilities == pytest.approx({"yes": 0.0, "no": 0.4})


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 2}, (3, 2)),
        ({"prompt_tokens": 3, "total_tokens": 5}, (3, 2)),
        ({"prompt_tokens": 3}, (3, 0)),
        ({"prompt_tokens": -3, "completion_tokens": 2}, None),
        ({"prompt_tokens": 10**400}, None),
        ({"prompt_tokens": True}, None),
        ([], None),
    ],
)
def test_tokens_are_what_a_server_can_have_used(told, expected):
    assert answers.usage({"usage": told}) == expected


def test_a_server_that_hides_the_opening_mark_of_a_thought():
    body = {"choices": [{"message": {"content": "so it is\n</think>\nblue"}, "finish_reason": "stop"}]}
    reply = answers.read(Chat("judge", (("user", "?"),), 5), Abilities(thinking_tokens=100), body)
    assert reply.text == "blue"


@pytest.mark.parametrize(
    "text",
    [
        '{"id": 1, "p": 0.5}',
        ' \n{"id": 1, "p": 0.5, "word": "yes"}\n',
        'Sure! Here it is:\n```json\n{"id": 1, "p": 0.5}\n```\nAnything else?',
        'The [best] answer {as I see it} is {"id": 1, "p": 1}.',
    ],
)
def test_one_answer_is_found(text):
    value, problem = schema.parse(text, POINT)
    assert not problem
    assert value["id"] == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no", "no valid JSON"),
        ("", "no valid JSON"),
        ('{"id": 1, "p": 0.5} or {"id": 2, "p": 0.5}', "2 JSON values"),
        ('{"id": "1", "p": 0.5}', "not of type integer"),
        ('{"id": 1, "p": "0.5"}', "not of type number"),
        ('{"id": 1.0, "p": 0.5}', "not of type integer"),
        ('{"id": true, "p": 0.5}', "not of type integer"),
        ('{"id": 7, "p": 0.5}', "not between"),
        ('{"id": 1, "p": 1e999}', "not between"),
        ('{"id": 1, "p": NaN}', "no valid JSON"),
        ('{"id": 1}', "lacks p"),
        ('{"id": 1, "p": 0, "q": 1}', "not asked for"),
        ('{"id": 1, "id": 2, "p": 0}', "no valid JSON"),
        ('{"id": 1, "p": 0, "word": "maybe"}', "not one of"),
        ('[{"id": 1, "p": 0}]', "not of type object"),
        ('{"answer": {"id": 1, "p": 0}', "no valid JSON"),  # what stands within broken JSON would be a guess
        ("[" * 100_000, "no valid JSON"),
        ('{"id": ' + "9" * 5000 + ', "p": 0}', ""),
        ('{"id": ' + "9" * 400 + ', "p": 0}', "not between"),
        ('{"id": 1, "p": ' + "9" * 400 + "}", "not between"),
        ('{"id": "\\ud83d", "p": 0}', "not of type integer"),
    ],
)
def test_what_is_not_exactly_one_valid_answer_is_none(text, problem):
    value, told = schema.parse(text, POINT)
    assert value is None
    assert told
    assert problem in told


def test_lists_have_the_length_that_is_asked_for():
    one = {"id": 1, "p": 0.5}
    assert schema.parse(json.dumps([one, one]), LIST)[1] == ""
    assert "between 2 and 2" in schema.parse(json.dumps([one]), LIST)[1]
    assert "[1]" in schema.parse(json.dumps([one, {"id": 2}]), LIST)[1]
    assert "half a character" in schema.parse('"\\ud83d"', {"type": "string"})[1]


def test_a_schema_that_is_not_understood_is_an_error():
    with pytest.raises(ValueError, match="anyOf"):
        schema.check(1, {"anyOf": []})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(JSON | st.text())
def test_whatever_comes_is_an_answer_or_a_problem(value):
    text = value if isinstance(value, str) else json.dumps(value)
    for rule in (POINT, LIST):
        found, problem = schema.parse(text, rule)
        assert bool(problem) == (schema.check(found, rule) != "")


TEXT = "The cat sat on"
TOLD = {
    "tokens": ["The", " cat", " sat", " on", " a"],
    "token_logprobs": [None, -1.0, -2.0, -4.0, -8.0],
    "top_logprobs": [None, {" cat": -1.0}, {" sat": -2.0, " 3": -0.5}, {" on": -4.0, " 10": -1.5}, {" 3": -0.25}],
}


def logprob(told, spans, choices=(), text=TEXT):
    body = {"choices": [{"logprobs": told}]}
    return answers.read(LogProb("reader", text, tuple(spans), choices), Abilities(), body)


def test_a_token_belongs_to_the_span_of_its_last_character():
    reply = logprob(TOLD, [(0, 7), (8, 11), (7, 11), (9, 14), (3, 14), (7, 10)])
    assert reply.logprobs == ((-1.0,), (-2.0,), (-2.0,), (-6.0,), (-7.0,), (0.0,))
    assert reply.counts == (1, 1, 1, 2, 3, 0)


@given(st.lists(st.integers(0, 14), min_size=1, max_size=4))
def test_adjacent_spans_share_no_token_and_lose_none(cuts):
    edges = [0, *sorted(cuts), 14]
    reply = logprob(TOLD, itertools.pairwise(edges))
    assert sum(value for (value,) in reply.logprobs) == pytest.approx(-7.0)
    assert sum(reply.counts) == 3


def test_levels_are_read_where_a_span_starts_also_at_the_end_of_the_text():
    reply = logprob(TOLD, [(8, 11), (12, 12), (14, 14)], ("3", "10"))
    assert reply.logprobs == ((-0.5, -math.inf), (-math.inf, -1.5), (-0.25, -math.inf))


def test_a_models_own_first_token_stands_before_the_text():
    told = {
        "tokens": ["<s>", "The", " cat"],
        "token_logprobs": [None, -3.0, -1.0],
    }
    assert logprob(told, [(0, 3), (3, 7)], text="The cat").logprobs == ((-3.0,), (-1.0,))


def test_parts_of_characters_count_where_the_character_is():
    told = {
        "tokens": ["a", " ", "\ufffd", "bytes:\\x80", "b"],
        "token_logprobs": [None, -1.0, -2.0, -4.0, -8.0],
    }
    reply = logprob(told, [(1, 2), (2, 3), (3, 4)], text="a \U0001f600b")
    assert reply.logprobs == ((-1.0,), (-6.0,), (-8.0,))


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": ["The", " dog", " sat", " on"]},
        {"tokens": ["The", " cat", " sat"]},
        {"tokens": []},
        {"tokens": ["The", " cat", "\ufffd", " on"]},
        {"token_logprobs": [None, -1.0]},
        {"token_logprobs": [None, math.nan, -1.0, -1.0, -1.0]},
        {"token_logprobs": [None, math.inf, -1.0, -1.0, -1.0]},
        {"token_logprobs": [None, 0.5, 0.5, 0.5, 0.5]},  # probabilities
        {"tokens": ["The", " cat", None, " sat", " on"]},
        {"tokens": "The cat sat on"},
    ],
)
def test_what_does_not_fit_the_text_is_no_answer(change):
    assert logprob({**TOLD, **change}, [(0, 7)]).failure == "unsupported"


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 1, "embedding": [0.5, 1]}, {"index": 0, "embedding": [2, 3]}],
        [{"embedding": [2, 3]}, {"embedding": [0.5, 1]}],
        [{"index": None, "embedding": [2, 3]}, {"index": None, "embedding": [0.5, 1]}],
        [{"embedding": [2, 3]}, {"index": None, "embedding": [0.5, 1]}],
        [{"index": 0, "embedding": "AAAAQAAAQEA="}, {"index": 1, "embedding": "AAAAPwAAgD8="}],
    ],
)
def test_vectors_come_in_the_order_of_the_texts(data):
    assert answers.read(Embed("encoder", ("a", "b")), Abilities(), {"data": data}).vectors == ((2.0, 3.0), (0.5, 1.0))


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "embedding": [1]}],
        [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}],
        [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": [1, 2]}],
        [{"index": 0, "embedding": ["1"]}, {"index": 1, "embedding": ["1"]}],
        [{"index": 0, "embedding": []}, {"index": 1, "embedding": []}],
        [{"embedding": [1]}],
        [{"embedding": [1]}, {"embedding": [1]}, {"embedding": [1]}],
        [{"index": 0, "embedding": [1]}, {"embedding": [1]}],
        [{"index": None, "embedding": [1]}, {"index": 0, "embedding": [1]}],
        [{"index": 1, "embedding": [1]}, {"index": 2, "embedding": [1]}],
        [{"index": -1, "embedding": [1]}, {"index": 0, "embedding": [1]}],
        [{"index": False, "embedding": [1]}, {"index": True, "embedding": [1]}],
        [{"index": "0", "embedding": [1]}, {"index": "1", "embedding": [1]}],
        [{"embedding": [math.nan]}, {"embedding": [1]}],
        [{"embedding": [None]}, {"embedding": [1]}],
        [{"embedding": [True]}, {"embedding": [1]}],
        [{"embedding": [10**400]}, {"embedding": [1]}],
        [{"embedding": [1e300]}, {"embedding": [1]}],
        [{"embedding": "AAA="}, {"embedding": "AAA="}],
        [[1], [1]],
    ],
)
def test_vectors_that_do_not_match_the_texts_are_no_answer(data):
    assert answers.read(Embed("encoder", ("a", "b")), Abilities(), {"data": data}).failure == "server_error"


TURNS = (("system", "Be brief."), ("user", "Is it?"))


@pytest.mark.parametrize(
    ("rung", "format_", "told"),
    [
        ("json_schema", {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": POINT}}, 0),
        ("json_object_schema", {"type": "json_object", "schema": POINT}, 0),
        ("json_object", {"type": "json_object"}, 1),
        ("plain", None, 1),
    ],
)
def test_a_schema_is_told_where_it_is_not_enforced(rung, format_, told):
    request = Chat("judge", TURNS, 30, schema=json.dumps(POINT))
    path, body = bodies.payload(request, "m", Abilities(structured=rung))
    assert path == "/chat/completions"
    assert body.get("response_format") == format_
    assert (request.schema in body["messages"][-1]["content"]) == bool(told)


def test_a_question_keeps_the_key_under_which_earlier_versions_stored_its_answer():
    request, able = Chat("judge", (("user", "is it?"),), 1, choices=("yes", "no")), Abilities(choices=True)
    key = cache_key(request, "m", "http://localhost:8000/v1", able)
    assert key == "590a790be279578071a679477d011ac3b1aed94c3d9cb05825ca9d864858b922"
    assert key != cache_key(request, "m", "http://localhost:8000/v1", replace(able, top=5))
    assert key == cache_key(request, "m", "http://localhost:8000/v1", replace(able, ends=False))


def test_what_is_sent_is_what_the_server_takes():
    able = Abilities(
        limit_name="max_completion_tokens", temperature=False, system=False, thinking_tokens=100, quiet='{"a": 1}'
    )
    _, body = bodies.payload(Chat("judge", TURNS, 30, temperature=1.0), "m", able)
    messages = [{"role": "user", "content": "Be brief.\n\nIs it?"}]
    assert body == {"model": "m", "messages": messages, "max_completion_tokens": 130, "a": 1}
    _, body = bodies.payload(Chat("judge", TURNS, 30, choices=("yes", "no")), "m", Abilities(choices=True, top=5))
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"], body["temperature"]) == (1, True, 5, 0.0)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), min_size=1, max_size=12), st.data())
def test_tokens_cut_anywhere_are_found_again(text, data):
    """Bytes cut at random, shown as servers show them: what is not whole characters is U+FFFD."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(raw)), max_size=8)) - {len(raw)})
    edges = [0, *cuts, len(raw)]
    tokens = [raw[a:b].decode(errors="replace") for a, b in itertools.pairwise(edges)]
    found = spans.token_places(text, [*tokens, " generated"])
    if found is None:
        return  # several characters in parts, beside their like
    assert len(found) == len(tokens)
    for token, (start, end) in zip(tokens, found, strict=True):
        if "\ufffd" not in token:
            assert text[start:end] == token or text[start:end] == " " + token
        assert 0 <= start < end <= len(text)
    assert found == sorted(found)


def test_a_text_with_many_parts_of_characters_is_followed():
    told = ["<s>", "The", " ", "\ufffd", "\ufffd", "\ufffd", " caf", "\u00e9", "", "", "s", " \ufffd", "\ufffd"]
    text = "The \u65e5 caf\u00e9\U0001f600s \u00df"
    places = [(-1, -1), (0, 3), (3, 4), *[(4, 5)] * 3, (5, 9), (9, 10), *[(10, 11)] * 2, (11, 12), (12, 13), (13, 14)]
    assert spans.token_places(text, told) == places
