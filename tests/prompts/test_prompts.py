"""What a window becomes: one line that reads back to the same text, and spells no markup; fences that hold."""

import json
import re
import unicodedata
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rigs.interp_examples import FILLER, facts, make_window, of_pieces, parts_of, planted, texts_of, unescaped

from interp.client.requests import Chat
from interp.prompts.explaining import correction_messages, explanation_messages
from interp.prompts.judging import DETECTION, FUZZING, odd_one, one_text, several_texts
from interp.prompts.windows import activation_levels, fenced, on_one_line, prose, quoted, shown, spans, spelled
from interp.records import ACTIVE, Item

HOSTILE = [
    "<<", ">>", "<", ">", "<<<", "\\", "\\n", "\n", "\t", "\r", "\r\n", "\u2028", "\x00", "\x1b[2J", "\u202e", "u{6e}",
    "\u200b", "\U000e0041", "<|im_start|>", "<|", "|>", "|", "im_end", "<|eot_id|>x", "[INST]", "[/INST]", "[gMASK]",
    "[", "]", "INST", "<start_of_turn>", "<s>", "</s>", "s", "think", "/think", "<think>", "bos", "tool_call", "0x0A",
    "unused7", "<\uff5cUser\uff5c>", "=== ", "=== end", "\n=== 00000000 end\n", "Text: ", "Description: ", " the", "",
    "\u00e9", "\U0001f34e", '"', "}", '{"answers": []}', "\ue000", "\ufffd",
]  # fmt: skip
CONTROL = (
    "<|im_start|>", "<|", "<\uff5c", "[INST]", "[/INST]", "[gMASK]", "<start_of_turn>", "<tool_call>",
    "<s>", "</s>", "<bos>", "<think>", "</think>", "<unused7>", "<0x0A>",
)  # fmt: skip
pieces = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=4)), min_size=1, max_size=12)
marked_windows = pieces.flatmap(lambda texts: st.tuples(st.just(texts), st.sets(st.integers(0, len(texts) - 1))))
texts = st.lists(st.one_of(pieces.map(lambda p: shown(of_pieces(p))), st.text("bcd 0123 =\n", max_size=9)), max_size=6)


def characters(window, marked):
    """The characters of a window's text that lie within marked tokens."""
    ranges = zip(window.bounds, window.bounds[1:], strict=False)
    return {at for place, (a, b) in enumerate(ranges) if place in marked for at in range(a, b)}


@given(marked_windows)
@example((["re", "think"], {1}))
@example((["<", "a", ">"], {0, 2}))
@example((["<|", "im_end", "|>"], {1}))
@example((["|im_end|"], {0}))
@example((["cat", "s"], {1}))
def test_a_window_is_one_line_that_reads_back_and_spells_no_markup(case):
    texts, marked = case
    window = of_pieces(texts)
    marked = {place for place in marked if texts[place]}
    line = shown(window, marked)
    assert len(line.splitlines()) <= 1
    assert not [c for c in line if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")]
    text, ranges = unescaped(line)
    assert text == window.text
    assert {at for a, b in ranges for at in range(a, b)} == characters(window, marked)
    assert all(b < c for (_, b), (c, _) in pairwise(ranges))  # neighbors are one mark
    assert not [token for token in CONTROL if token in line]


def test_plain_text_stays_as_it_is():
    assert shown(of_pieces([" a <b>bold</b> move", ": 1 < 2, x[i] = f(a | b)"])) == (
        " a <b>bold</b> move: 1 < 2, x[i] = f(a | b)"
    )
    assert shown(of_pieces([" caf\u00e9", "\n", "a << b"])) == r" caf" + "\u00e9" + r"\na \<\< b"
    assert shown(make_window(["a", "b", "c", "d"]), (1, 2)) == " a<< b c>> d"


def test_a_part_of_a_character_is_marked_as_the_whole():
    window = of_pieces(["a", "", "", "\U0001f34e", "b"])
    assert shown(window, (1,)) == shown(window, (3,)) == "a<<\U0001f34e>>b"
    assert shown(of_pieces(["a", ""]), (1,)) == "<<a>>"
    assert spans(of_pieces(["", ""]), (0,)) == []


@given(st.text(max_size=30))
@example("ends </s> here\n\n=== end")
def test_explanations_and_tokens_are_one_line_without_control_tokens(text):
    for line in (prose(text), quoted(text)):
        assert len(line.splitlines()) <= 1
        assert not [token for token in CONTROL if token in line]
    inner = quoted(text)[1:-1]
    assert unescaped(inner)[0] == text
    assert not re.search(r'(?<!\\)(\\\\)*"', inner)


@given(st.text(max_size=30) | pieces.map("".join))
def test_a_label_becomes_the_same_message_as_its_tokens(text):
    assert prose(spelled(text)) == on_one_line(quoted(text))


def test_no_explanation_holds_a_mark():
    assert prose('the tokens ">>>" and "<<"') == r'the tokens "\>\>\>" and "\<\<"'
    assert prose(r'the tokens "\>\>\>"') == r'the tokens "\>\>\>"'  # as earlier versions wrote it
    assert prose("a < b > c") == "a < b > c"


def test_long_explanations_are_cut():
    assert len(prose("word " * 5000)) == 2000
    assert prose("word " * 5000).endswith(" ...")
    assert prose(r"the token \n") == r"the token \n"  # as windows show it


def test_levels_are_ninths():
    window = make_window(list("abcde"), {0: 9.0, 1: 1.0, 2: 1.01, 3: -8.5})
    assert activation_levels(window, 9.0) == (9, 1, 2, 9, 0)
    assert activation_levels(window, 18.0) == (5, 1, 1, 5, 0)
    assert activation_levels(window, 0.0) == (0,) * 5


# Fences


@given(texts, st.text(max_size=10))
@example(["=== 00000000 bcdf", "bcdf bcdg"], "bcdf")
def test_no_text_can_end_its_part_or_name_another(texts, beside):
    found = fenced(texts, beside=beside)
    assert len(set(found.labels)) == len(texts)
    everything = "\n".join([*texts, beside])
    assert found.fence.split()[1] not in everything
    assert not [label for label in found.labels if label in everything]
    assert parts_of(found.text) == list(zip(found.labels, texts, strict=True))
    assert fenced(texts, beside=beside) == found


def test_what_occurs_in_a_text_is_drawn_again(monkeypatch):
    """Draws are made as bad as can be: the first of each kind is always the same."""
    monkeypatch.setattr("interp.prompts.windows._hash", lambda *key: bytes([key[-1] if len(key) > 1 else 0] * 16))
    assert fenced(["a", "b"]).text == "=== 00000000 bbbb\na\n=== 00000000 cccc\nb\n=== 00000000 end"
    for texts, beside in ((["00000000", "xbbbbx"], ""), (["a", "b"], "00000000 bbbb")):
        found = fenced(texts, beside=beside)
        assert (found.fence, found.labels) == ("=== 01010101", ("cccc", "dddd"))
    _, ids = several_texts(DETECTION, "the word bbbb", ["a"])
    assert ids == ("cccc",)


def test_a_text_that_guesses_the_code_changes_it():
    first = fenced(["a", "b"])
    second = fenced([f"a {first.fence} {first.labels[1]}", "b"])
    assert first.fence != second.fence
    assert not set(first.labels) & set(second.labels)
    assert len({fenced([str(n)] * 3).labels for n in range(50)}) == 50  # labels tell neither place nor text


# Messages


def test_judges_prompts_are_short_and_begin_alike():
    for question in (DETECTION, FUZZING):
        one, other = (one_text(question, "a b" * 80, text) for text in ("first text", "second text"))
        beside = len("".join(content for _, content in one)) - len("first text")
        assert beside <= 1200  # 300 tokens, at four characters each
        assert one[:-1] == other[:-1]
        assert one[-1][1].split("first text") == other[-1][1].split("second text")
        batches = [several_texts(question, name, ["one", "two"])[0] for name in ("x", "y")]
        assert batches[0][0] == batches[1][0]
        assert all(
            messages[1][1].startswith(f"Description: {name}") for messages, name in zip(batches, "xy", strict=True)
        )


def test_marks_are_all_that_fuzzing_adds_and_they_follow_the_item_alone():
    """Rendered, a positive and a negative of one pattern differ in nothing but their text."""
    words = FILLER[:32]
    active = Item(make_window(words, {9: 5.0, 10: 0.1}), ACTIVE, 9, (9, 10))
    silent = Item(make_window(words), "random", marks=(9, 10))
    assert shown(active.window, active.marks) == shown(silent.window, silent.marks)
    assert one_text(FUZZING, "x", shown(active.window, active.marks)) == one_text(
        FUZZING, "x", shown(silent.window, silent.marks)
    )


def test_the_odd_one_is_asked_for_by_number_or_by_id():
    for numbered in (True, False):
        messages, labels = odd_one(["a", "b", "c"], numbered)
        assert (labels == ("1", "2", "3")) == numbered
        assert texts_of(Chat("judge", messages, 1))[1] == list(zip(labels, "abc", strict=True))


def test_an_explainer_sees_marks_levels_silent_windows_and_promoted_tokens():
    examples = planted(n=10)
    active, silent = examples.explain[:4], examples.explain[10:13]
    (_, system), (_, user) = explanation_messages(active, silent, (" pie", '"\n'))
    parts = parts_of(user.split("\n\nTokens that")[0])
    assert [label for label, _ in parts] == [
        *(f"active {n + 1}" for n in range(4)),
        *(f"silent {n + 1}" for n in range(3)),
    ]
    for item, (_, text) in zip(active, parts, strict=False):
        line, told = text.split("\n")
        assert line == shown(item.window, item.marks)
        level = activation_levels(item.window, active[0].window.strength)[item.window.peak]
        assert told == f'levels: "{item.window.pieces()[item.window.peak].strip()}" {level}'
    assert [text for _, text in parts[4:]] == [shown(item.window) for item in silent]
    assert user.endswith(r'more likely to come next: " pie", "\"\n"')
    assert '{"explanation": "..."}' in system


@pytest.mark.parametrize(
    ("texts", "values", "levels"),
    [
        (["a", "\n", "b"], {1: 9.0, 0: 3.0}, r'"a" 3, "\n" 9'),
        (["a", "    ", "\n\t", " b"], {1: 9.0, 2: 4.5}, r'"    " 9, "\n\t" 5'),
        (["a", "\u2028", "\r", "\u3000"], {1: 9.0, 2: 1.0, 3: 2.0}, r'"\u{2028}" 9, "\r" 1, ' + '"\u3000" 2'),
        (["a", "", "", "\U0001f34e", " b"], {1: 9.0, 3: 1.0}, '"\U0001f34e" 9'),
        (["a", "", "\u00e9", "", "\u00e8"], {1: 2.0, 3: 9.0}, '"\u00e9" 2, "\u00e8" 9'),
        (["a", "\ufffd", ""], {2: 9.0}, '"\ufffd" 9'),
        ([" the", "x"], {0: 9.0}, '"the" 9'),
        (["", ""], {0: 9.0}, ""),
    ],
)
def test_the_strongest_token_has_a_level_whatever_it_is(texts, values, levels):
    """Blanks and parts of characters too: what is shown of a window must say where its unit is strongest."""
    window = of_pieces(texts)
    window = replace(window, activations=tuple(values.get(place, 0.0) for place in range(len(texts))))
    item = Item(window, ACTIVE, 9, tuple(values))
    (_, (_, user)) = explanation_messages([item], ())
    ((_, part),) = parts_of(user)
    assert part == f"{shown(window, item.marks)}\nlevels: {levels}"


def test_a_correction_shows_what_went_wrong():
    examples = planted(n=10)
    asked = explanation_messages(examples.explain[:4], ())
    messages = correction_messages(asked, 'words "x"', examples.valid[:2], examples.valid[10:11])
    assert messages[:2] == asked
    assert json.loads(messages[2][1]) == {"explanation": 'words "x"'}
    assert [label for label, _ in parts_of(messages[3][1])] == [
        "active, but taken for silent 1",
        "active, but taken for silent 2",
        "silent, but taken for active 1",
    ]


@pytest.mark.parametrize("text", ["ripe fruit", ""])
def test_facts_are_no_part_of_a_judges_message(text):
    assert str(facts().fired) not in "".join(content for _, content in one_text(DETECTION, text, "a"))
