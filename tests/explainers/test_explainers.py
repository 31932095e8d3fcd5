"""Explainers: what is asked of a model, what becomes of its answers, and the rules that need none."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs.interp_examples import FILLER, FRUIT, SINGLE, facts, label, make_window, of_pieces, parts_of, planted

from interp.client.requests import Reply
from interp.explainers.llm import LanguageModelExplainer
from interp.explainers.next_token import NextToken
from interp.explainers.output_centric import OutputCentric
from interp.explainers.single_token import SingleToken
from interp.explainers.token_lookup import TokenLookup, rule_score
from interp.prompts.explaining import correction_messages
from interp.prompts.windows import prose, shown
from interp.records import ACTIVE, Examples, Explanation, Item, Judgement
from interp.scorers.detection import Detection
from sae.base.errors import ConfigError

EXAMPLES = planted(n=40)


def examples_of(active, silent=(), **known):
    explain = [Item(window, ACTIVE, 5) for window in active] + [Item(window, "random") for window in silent]
    return Examples(0, facts(**known), tuple(explain))


def told(reply):
    return Reply(data={"explanation": reply})


def sections(request):
    return [(name.rstrip(" 0123456789"), text.split("\n")[0]) for name, text in parts_of(request.messages[1][1])]


# A language model


def test_candidates_are_asked_for_with_the_same_windows():
    requests = LanguageModelExplainer(candidates=3).requests(EXAMPLES, SINGLE)
    assert [(request.role, request.temperature, request.sample) for request in requests] == [
        ("explainer", 0.0, 0),
        ("explainer", 0.7, 1),
        ("explainer", 0.7, 2),
    ]
    assert len({request.messages for request in requests}) == 1
    assert json.loads(requests[0].schema)["required"] == ["explanation"]
    explain = EXAMPLES.explain
    parts = sections(requests[0])
    assert [name for name, _ in parts] == ["active"] * 20 + ["silent"] * 10
    assert parts[0][1] == shown(explain[0].window, explain[0].marks)  # the strongest
    assert parts[19][1] == shown(explain[39].window, explain[39].marks)  # and the weakest
    active = [shown(item.window, item.marks) for item in explain[:40]]
    steps = [active.index(text) for name, text in parts if name == "active"]
    assert steps == sorted(set(steps))
    assert max(b - a for a, b in pairwise(steps)) <= 3


def test_an_explainer_sees_the_explain_split_alone():
    other = planted(1)
    for explainer in (LanguageModelExplainer(), TokenLookup(), SingleToken(), NextToken(), OutputCentric()):
        swapped = replace(EXAMPLES, valid=other.valid, test=other.test)
        assert explainer.requests(EXAMPLES, SINGLE) == explainer.requests(swapped, SINGLE)
        assert explainer.explanations(EXAMPLES, []) == explainer.explanations(swapped, [])


@pytest.mark.parametrize("room", [1000, 3000, 5000])
def test_prompts_keep_to_their_budget(room):
    (request,) = LanguageModelExplainer(max_prompt_chars=room).requests(EXAMPLES, SINGLE)
    kinds = [name for name, _ in sections(request)]
    length = sum(len(content) for _, content in request.messages)
    assert length <= room or kinds == ["active"]
    assert length > room * 0.75
    assert 1 <= kinds.count("active") < 20
    few = replace(EXAMPLES, explain=EXAMPLES.explain[:2])
    assert [name for name, _ in sections(LanguageModelExplainer().requests(few, SINGLE)[0])] == ["active"] * 2
    assert LanguageModelExplainer().requests(replace(EXAMPLES, explain=EXAMPLES.explain[40:]), SINGLE) == []


def test_answers_that_are_no_explanations_are_dropped():
    replies = [
        told("  names of\n fruit "),
        told("names of fruit"),
        told(""),
        told(" \n"),
        told("word " * 301),
        told(3),
        Reply(data=["names"]),
        Reply(failure="refused"),
        told("x" * 10_000),
    ]
    found = LanguageModelExplainer().explanations(EXAMPLES, replies)
    assert found == [Explanation(0, "names of fruit", "llm")]
    assert LanguageModelExplainer().explanations(EXAMPLES, []) == []


def test_a_correction_shows_the_worst_mistakes():
    tasks = Detection().tasks(EXAMPLES, "valid", {})
    active = [place for place, task in enumerate(tasks) if task.truth]
    silent = [place for place, task in enumerate(tasks) if not task.truth]
    values = [task.truth for task in tasks]
    values[active[0]], values[active[1]], values[active[2]] = 0.4, 0.1, None
    values[silent[0]], values[silent[1]], values[silent[2]] = 0.6, 0.9, 0.49
    judged = [(task, Judgement(value)) for task, value in zip(tasks, values, strict=True)]
    explainer = LanguageModelExplainer(counterexamples=1)
    (request,) = explainer.refined(EXAMPLES, label("fruit"), judged, SINGLE)
    assert request.messages[:2] == explainer.requests(EXAMPLES, SINGLE)[0].messages
    assert json.loads(request.messages[2][1]) == {"explanation": "fruit"}
    shown_now = [text.split("\n")[0] for _, text in parts_of(request.messages[3][1])]
    overlooked, mistaken = tasks[active[1]].items[0], tasks[silent[1]].items[0]
    assert shown_now == [shown(overlooked.window, overlooked.marks), shown(mistaken.window)]
    right = [(task, Judgement(task.truth)) for task in tasks]
    assert explainer.refined(EXAMPLES, label("fruit"), right, SINGLE) == []
    assert explainer.refined(EXAMPLES, label("fruit"), [], SINGLE) == []


# Rules


def test_lookup_knows_the_tokens_and_its_rule_is_json():
    (found,) = TokenLookup().explanations(EXAMPLES, [])
    names = {f'" {fruit}"' for fruit in FRUIT}
    assert set(found.text.removeprefix("fires on the tokens ").split(", ")) == names
    rule = json.loads(json.dumps(found.rule))
    assert set(rule) == {"tokens", "threshold"}
    for item in EXAMPLES.test:
        score = rule_score(rule, item.window)
        assert 0 <= score <= 1
        assert (score >= 0.5) == any(fruit in item.window.text for fruit in FRUIT)
        assert (rule_score(rule, item.window, item.marks) >= 0.5) == (score >= 0.5)
        assert rule_score(rule, item.window, (item.marks[0] - 1,)) == 0  # another token


def test_lookup_weighs_tokens_by_how_often_the_latent_fires_on_them():
    always = [make_window([*FILLER[:9], "yes", "mid"], {9: 1.0, 10: 1.0}) for _ in range(8)]
    seldom = [make_window([*FILLER[:9], "mid", "no"]) for _ in range(24)]
    (found,) = TokenLookup().explanations(examples_of(always, seldom), [])
    yes, mid = (always[0].tokens[place] for place in (9, 10))
    assert found.rule["tokens"] == pytest.approx({str(yes): 8 / 9, str(mid): 8 / 33}, abs=1e-6)
    assert found.text == 'fires on the tokens " yes"'
    assert 8 / 33 < found.rule["threshold"] < 7 / 8
    below, above = (rule_score(found.rule, make_window([word])) for word in ("mid", "yes"))
    assert 0 < below < 0.5 < above


def test_lookup_is_not_taken_in_by_what_it_has_seen_once():
    """Tokens of one window each fit these windows, and say nothing of others: the threshold must not rest on them."""
    own = [make_window([*FILLER[:5], f"own{n}"], {5: 1.0}) for n in range(10)]
    cue = [make_window([*FILLER[:5], "cue"], {5: 1.0}) for _ in range(10)]
    silent = [make_window([*FILLER[:5], "cue" if n < 5 else "at"]) for n in range(20)]
    (alone,) = TokenLookup().explanations(examples_of(own, silent), [])
    assert alone.rule["threshold"] == 0  # nothing tells these windows apart, and it does not pretend to
    (found,) = TokenLookup().explanations(examples_of([*own, *cue], silent), [])
    assert found.rule["threshold"] == pytest.approx(9 / 15 / 2)  # between other windows, 0, and those with "cue"


def test_lookup_has_nothing_to_say_without_both_kinds():
    assert TokenLookup().explanations(examples_of([make_window(["a"], {0: 1.0})]), []) == []
    assert TokenLookup().explanations(examples_of([], [make_window(["a"])]), []) == []
    assert TokenLookup().explanations(Examples(0, facts()), []) == []


@given(
    st.dictionaries(st.integers(0, 9).map(str), st.floats(0.01, 0.99), max_size=5),
    st.floats(0, 0.99),
    st.lists(st.integers(0, 12), max_size=6),
)
def test_rule_scores_are_ordered_as_the_weights(tokens, threshold, window):
    plain = replace(of_pieces(["x"] * len(window)), tokens=tuple(window))
    score = rule_score({"tokens": tokens, "threshold": threshold}, plain)
    best = max((tokens.get(str(token), 0.0) for token in window), default=0.0)
    assert 0 <= score <= 1
    assert (score >= 0.5) == (best >= threshold)


def test_a_single_word_is_named_whatever_its_form():
    forms = [" Apple", "apple", " apple", " APPLE"]
    windows = [
        replace(of_pieces([" the", form, " of"]), activations=(0.0, 2.0 + (n == 2), 0.1))
        for n, form in enumerate(forms)
    ]
    (found,) = SingleToken().explanations(examples_of(windows * 3), [])
    assert found == Explanation(0, 'the word "apple"', "single_token")
    newline = replace(of_pieces(["a", "\n"]), activations=(0.0, 1.0))
    assert SingleToken().explanations(examples_of([newline]), [])[0].text == r'the word "\n"'


def test_several_words_have_no_single_one():
    assert SingleToken().explanations(EXAMPLES, []) == []  # four fruits
    scattered = [make_window([f"w{n}"], {0: 1.0}) for n in range(30)] + [make_window(["w0"], {0: 90.0})]
    assert SingleToken(most_tokens=20, share=0.95).explanations(examples_of(scattered), []) == []
    assert SingleToken().explanations(examples_of(scattered), [])[0].text == 'the word "w0"'
    assert SingleToken().explanations(examples_of([], [make_window(["a"])]), []) == []
    nothing = replace(of_pieces(["", "x"]), activations=(1.0, 0.0))  # a part of a character
    assert SingleToken().explanations(examples_of([nothing]), []) == []


def next_windows(word, n=10, active=True, other="zeal"):
    return [
        make_window(
            [*FILLER[n : n + 8], FILLER[n + 20], word if i < n else other, "end"], {8: 1.0} if active else {}, i, 8
        )
        for i in range(10)
    ]


def test_a_word_that_always_follows_is_named():
    (found,) = NextToken().explanations(examples_of(next_windows("York"), next_windows("the")), [])
    assert found == Explanation(0, 'say "york": the text just before the word "york"', "next_token")
    assert NextToken().explanations(examples_of(next_windows("York", 5), next_windows("the")), []) == []
    assert NextToken().explanations(examples_of(next_windows("the"), next_windows("the")), []) == []  # it always does
    assert NextToken().explanations(examples_of(next_windows("York")[:4]), []) == []
    assert NextToken().explanations(examples_of([]), []) == []


@pytest.mark.parametrize(
    ("after", "word"),
    [
        (["\u82f9\u679c\u5f88\u597d", "\u82f9\u679c\uff0c\u6211", "\u82f9\u679c\u548c\u68a8"], "\u82f9\u679c"),
        (["\u3067\u3059\u304b", "\u3067\u3059\u306d", "\u3067\u3059\u3002"], "\u3067\u3059"),
        (["\u0e04\u0e23\u0e31\u0e1a", "\u0e04\u0e23\u0e31\u0e1a\u0e1c\u0e21"], "\u0e04\u0e23\u0e31\u0e1a"),
    ],
    ids=["Chinese", "Japanese", "Thai"],
)
def test_what_always_follows_is_found_without_blanks_between_words(after, word):
    windows = [of_pieces(["x", text]) for text in after * 4]
    active = [replace(window, activations=(1.0, 0.0)) for window in windows]
    silent = [of_pieces(["x", "\u5929\u6c14\u5f88\u597d"])] * 6
    (found,) = NextToken().explanations(examples_of(active, silent), [])
    assert found.text == f'say "{word}": the text just before the word "{word}"'
    for promoted in ((word,), (word[0],), (word + "\u3002",), ("\ufffd", "zeal")):  # whole, its beginning, or bytes
        assert NextToken().explanations(examples_of(active, silent, promoted=promoted), [])
    assert NextToken().explanations(examples_of(active, silent, promoted=("zeal",)), []) == []


def test_labels_hold_tokens_as_they_are_and_messages_what_cannot_be_markup():
    """What people read has no escapes, and what models read has them all the same."""
    pieces = [">>>", "<|im_end|>", "</s>", "[INST]", "\n", '"', "\\", "\u200b"]
    windows = [replace(of_pieces([piece, " x"]), activations=(1.0, 0.0)) for piece in pieces]
    silent = [replace(of_pieces([" y", " z"]), tokens=(90, 91))] * 8
    windows = [replace(window, tokens=(number, 50)) for number, window in enumerate(windows)]
    (found,) = TokenLookup().explanations(examples_of(windows, silent), [])
    for form in ('">>>"', '"<|im_end|>"', '"</s>"', '"[INST]"', r'"\n"', r'"\""', r'"\\"', r'"\u{200b}"'):
        assert form in found.text
    for form in (r'"\>\>\>"', r'"<\|im_end|>"', r'"<\/s>"', r'"[INST\]"'):
        assert form in prose(found.text)


@pytest.mark.parametrize(
    "text", ["the prompt >>>", "a << b", "<|im_end|> ends", "</s> or [INST]", r"the regex \d and \n"]
)
def test_what_a_model_copies_of_a_windows_escapes_is_read_back(text):
    copied = told(shown(of_pieces([text])) if "regex" not in text else text)
    (found,) = LanguageModelExplainer().explanations(EXAMPLES, [copied])
    assert found.text == text
    again = correction_messages((("user", "x"),), found.text, (), ())[1][1]
    assert "<|" not in again
    assert "</s>" not in again


def test_what_is_promoted_must_agree_with_what_follows():
    windows = next_windows("York"), next_windows("the")
    assert NextToken().explanations(examples_of(*windows, promoted=(" York", " city")), [])
    assert NextToken().explanations(examples_of(*windows, promoted=("\n", " Yor")), [])  # its first token
    assert NextToken().explanations(examples_of(*windows, promoted=(" city", " ", "y")), []) == []


def test_what_is_promoted_is_listed():
    known = facts(promoted=(" pie", " ", " pie", "\n", "<s>", *map(str, range(20))))
    (found,) = OutputCentric(named=4).explanations(replace(EXAMPLES, facts=known), [])
    assert found.text == r'text before which these tokens are likely: " pie", "<s>", "0", "1"'
    assert OutputCentric().explanations(EXAMPLES, []) == []


@pytest.mark.parametrize(
    ("explainer", "field"),
    [
        (LanguageModelExplainer(candidates=0), "llm.candidates"),
        (LanguageModelExplainer(shown=0), "llm.shown"),
        (LanguageModelExplainer(temperature=-1), "llm.temperature"),
        (LanguageModelExplainer(max_prompt_chars=10), "llm.max_prompt_chars"),
        (TokenLookup(0), "token_lookup.named"),
        (SingleToken(share=0), "single_token.share"),
        (SingleToken(most_tokens=0), "single_token.most_tokens"),
        (NextToken(1.5), "next_token.share"),
        (OutputCentric(0), "output_centric.named"),
    ],
)
def test_bad_fields_are_named(explainer, field):
    with pytest.raises(ConfigError, match=rf"explainers\.{field}: "):
        explainer.validate()
    type(explainer)().validate()
