"""A request of OpenAI's protocol: what is taken, what is refused, and by which field."""

import pytest

from interp.view.serving.asked import UNSERVED, asked
from interp.view.serving.limits import Limits
from interp.view.serving.refusing import Refused
from sae.steering.edits import as_edits

LIMITS = Limits()
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PLAIN = {"model": "m", "prompt": "hi"}


def taken(body, chat=None):
    return asked(body, "messages" in body if chat is None else chat, "m", 100, LIMITS)


def test_what_is_left_out_is_as_the_protocol_says():
    plain, chat = taken(PLAIN), taken(CHAT)
    assert (plain.prompts, plain.new_tokens, plain.temperature, plain.n, plain.logprobs) == (("hi",), 16, 1.0, 1, False)
    assert (chat.prompts, chat.new_tokens, chat.stream, chat.edits) == ((CHAT["messages"],), None, False, ())
    assert taken({**PLAIN, "seed": None, "stop": None, "logit_bias": None, "user": "u", "store": True}).stop == ()
    assert taken(PLAIN).seed != taken(PLAIN).seed  # nothing is said, so that it is another draw
    assert taken({**PLAIN, "seed": -3}).seed == -3


def test_a_prompt_is_a_text_ids_or_several():
    assert taken({**PLAIN, "prompt": [1, 2]}).prompts == ([1, 2],)
    assert taken({**PLAIN, "prompt": [[1, 2], [3]]}).prompts == ([1, 2], [3])
    assert taken({**PLAIN, "prompt": ["a", "b"]}).prompts == ("a", "b")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "developer", "content": parts}
    assert taken({**CHAT, "messages": [message]}).prompts == ([{"role": "system", "content": "ab"}],)


def test_the_edit_stands_in_a_field_or_in_the_name():
    edits = as_edits("8=4x, 17:ablate")
    for body in (
        {**PLAIN, "steer": "8=4x, 17:ablate"},
        {**PLAIN, "model": "m+8=4x, 17:ablate"},
        {**PLAIN, "steer": [{"latent": 8, "strength": 4, "unit": "largest"}, {"latent": 17, "how": "ablate"}]},
    ):
        assert taken(body).edits == edits
    assert taken({**PLAIN, "steer": ""}).edits == ()
    assert asked({**PLAIN, "model": "a+b+8=4"}, False, "a+b", 100, LIMITS).edits == as_edits("8=4")


def test_logprobs_are_of_either_protocol():
    assert (taken({**PLAIN, "logprobs": 0}).logprobs, taken({**PLAIN, "logprobs": 3}).top) == (True, 3)
    found = taken({**CHAT, "logprobs": True, "top_logprobs": 7, "max_tokens": 9, "max_completion_tokens": 5})
    assert (found.logprobs, found.top, found.new_tokens) == (True, 7, 5)
    assert taken({**PLAIN, "echo": True, "max_tokens": 0}).new_tokens == 0
    assert taken({**PLAIN, "stream": True, "stream_options": {"include_usage": True}}).usage


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "other"}, "model: 'other' is not served here; m is"),
        ({"model": 3}, "model: 3"),
        ({"model": "mm+8=4"}, "model: 'mm\\+8=4'"),
        ({"model": "m+8=4", "steer": "8=4"}, "steer: the model's name has an edit as well"),
        ({"steer": "100=4"}, "steer: latent: 100"),
        ({"steer": "months"}, "steer: edits: 'months'"),
        ({"steer": [[[]] * 3]}, None),
        ({"steer": ",".join(f"{n}=1" for n in range(17))}, "steer: 17 edits; at most 16"),
        ({"steer": {"latent": 3, "power": 2}}, "steer: edits: 'power'"),
        ({"prompt": ""}, None),
        ({"prompt": 5}, "prompt: it is no text"),
        ({"prompt": []}, "prompt: it is no text"),
        ({"prompt": [1, "a"]}, "prompt: it is no text"),
        ({"prompt": [[1], [True]]}, "prompt: it is no text"),
        ({"prompt": ["a"] * 129}, "prompt: 129 texts; at most 128"),
        ({"prompt": "x" * 20_001}, "prompt: 20001 characters; at most 20000"),
        ({"temperature": 2.1}, "temperature: 2.1 is no number from 0 to 2"),
        ({"temperature": "hot"}, "temperature: 'hot'"),
        ({"temperature": True}, "temperature: True"),
        ({"top_p": -1}, "top_p: -1"),
        ({"max_tokens": 1025}, "max_tokens: 1025 is no whole number from 0 to 1024"),
        ({"max_tokens": 1.5}, "max_tokens: 1.5"),
        ({"n": 0}, "n: 0"),
        ({"n": 17}, "n: 17"),
        ({"seed": 2**64}, "seed: "),
        ({"stop": ["a"] * 5}, "stop: it is neither"),
        ({"stop": [""]}, "stop: it is neither"),
        ({"stop": 3}, "stop: it is neither"),
        ({"stream": "yes"}, "stream: it is neither true nor false"),
        ({"logprobs": 6}, "logprobs: 6 is no whole number from 0 to 5"),
        ({"echo": 1}, "echo: it is neither"),
        ({"best_of": 2}, "best_of: this server does not serve it"),
        ({"suffix": "x"}, "suffix: this server does not serve it"),
    ],
)
def test_what_cannot_be_is_one_line_with_its_field(change, said):
    if said is None:
        taken({**PLAIN, **change})
        return
    with pytest.raises(Refused, match=said) as caught:
        taken({**PLAIN, **change})
    assert caught.value.field == said.split(":")[0]
    assert caught.value.status == (404 if "not served here" in str(caught.value) else 400)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": []}, "messages: it is no list"),
        ({"messages": "hi"}, "messages: it is no list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages: the role of number 0"),
        ({"messages": ["hi"]}, "messages: the role of number 0"),
        ({"messages": [{"role": "user"}]}, "messages: number 0 holds something else than text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages: number 0"),
        ({"top_logprobs": 3}, "top_logprobs: it needs logprobs"),
        ({"logprobs": 3}, "logprobs: it is neither"),
    ],
)
def test_what_is_no_chat_is_one_line_with_its_field(change, said):
    with pytest.raises(Refused, match=said) as caught:
        taken({**CHAT, **change})
    assert caught.value.field == said.split(":")[0]


@pytest.mark.parametrize("name", UNSERVED)
def test_what_would_change_the_answer_and_is_not_served_is_refused(name):
    with pytest.raises(Refused, match=f"{name}: this server does not serve it"):
        taken({**CHAT, name: {"x": 1}})
    for same in UNSERVED[name] or ():
        taken({**CHAT, name: same})


@pytest.mark.parametrize("body", [None, [], "x", 3])
def test_what_is_no_object_is_refused(body):
    with pytest.raises(Refused, match="no JSON object"):
        asked(body, True, "m", 100, LIMITS)
