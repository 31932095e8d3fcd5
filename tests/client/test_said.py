"""What a message says, however a server keeps the answer, what was thought and a refusal apart."""

import pytest

from interp.client.said import Said, ends_in_thought, said_in, shows_thought, thought

DEEP: object = "deep"
for _ in range(300):
    DEEP = [{"type": "text", "text": DEEP}]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "blue"}, Said("blue")),
        ({"content": None}, Said()),
        ({"content": [{"type": "text", "text": "bl"}, {"type": "text", "text": "ue"}]}, Said("blue")),
        ({"content": [{"type": "output_text", "text": "blue", "annotations": []}]}, Said("blue")),
        ({"content": [{"type": "text", "text": {"value": "blue"}}]}, Said("blue")),
        ({"content": ["bl", {"text": "ue"}]}, Said("blue")),
        ({"content": {"type": "text", "text": "blue"}}, Said("blue")),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"text": "blue"}]},
            Said("blue", "hm"),
        ),
        ({"content": [{"type": "reasoning_text", "text": "hm"}, {"type": "text", "text": "blue"}]}, Said("blue", "hm")),
        ({"content": [{"type": "refusal", "refusal": "I cannot"}]}, Said(refusal="I cannot")),
        ({"content": "", "refusal": "I cannot"}, Said(refusal="I cannot")),
        ({"content": [{"type": "image_url", "image_url": {"url": "data:"}}, {"text": "blue"}]}, Said("blue")),
        ({"content": "blue", "reasoning_content": "hm"}, Said("blue", "hm", "reasoning_content")),
        (
            {"content": "blue", "reasoning": "hm", "reasoning_details": [{"text": "hm"}]},
            Said("blue", "hm", "reasoning"),
        ),
        (
            {"content": "blue", "reasoning_details": [{"type": "reasoning.summary", "summary": "hm"}]},
            Said("blue", "hm", "reasoning_details"),
        ),
        ({"content": [{"type": ["?"], "text": 5}, 7, None, {"type": "text"}]}, Said()),
        ({"content": DEEP}, Said()),
        ("a text", Said()),
        (None, Said()),
        ({"content": [{"text": "half \ud83d one"}]}, Said("half ? one")),
    ],
)
def test_a_message_is_taken_apart(message, expected):
    said = said_in(message)
    assert (said.text, said.thinking, said.refusal) == (expected.text, expected.thinking, expected.refusal)
    assert not expected.where or said.where == expected.where


@pytest.mark.parametrize(
    ("text", "thinks", "expected"),
    [
        ("<think>hm</think>\nblue", False, "\nblue"),
        ("\n<thinking>hm</thinking>blue", False, "blue"),
        ("<think>hm</think> <think>well</think>blue", False, "blue"),
        ("<reasoning>hm </think> hm</reasoning>blue", False, "blue"),
        ("<seed:think>hm</seed:think>blue", False, "blue"),
        ("[THINK]hm[/THINK]blue", False, "blue"),
        ("\u25c1think\u25b7hm\u25c1/think\u25b7blue", False, "blue"),
        ("<|begin_of_thought|>hm<|end_of_thought|>blue", False, "blue"),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>blue",
            False,
            "blue",
        ),
        ("<think>hm", False, None),
        ("<|channel|>analysis<|message|>hm", True, None),
        ("<|channel>thought\nhm<channel|>blue", False, "blue"),
        ("hm\n</think>\n\nblue", False, "\nblue"),  # the opening is in the prompt
        ("hm</think>blue", True, "blue"),
        ("it says </think> here", False, "it says </think> here"),
        ("it says <think> here", False, "it says <think> here"),
        ("blue", True, "blue"),
    ],
)
def test_what_was_thought_before_an_answer_is_no_part_of_it(text, thinks, expected):
    assert thought(text, thinks) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (Said("1, 2, 3"), False),
        (Said("<think>1, 2"), True),
        (Said("so</think>1, 2"), True),
        (Said("<|channel|>analysis<|message|>We"), True),
        (Said("1, 2", "hm"), True),
        (Said("we <think> that 1"), False),
    ],
)
def test_signs_of_thinking(said, expected):
    assert shows_thought(said) is expected


def test_a_prompt_may_begin_the_thought():
    assert ends_in_thought("<user>?</user><assistant><think>\n")
    assert ends_in_thought("[THINK]")
    assert not ends_in_thought("<think></think>")
