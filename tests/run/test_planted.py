"""A latent of which the truth is known, and a judge that reads: right labels score 1, each fault shows its own way."""

from dataclasses import replace

import pytest
from rigs.interp_examples import BATCH, FILLER, FRUIT, RIGHT, SINGLE, label, make_window, planted, scored

from interp.explainers.token_lookup import TokenLookup
from interp.records import TIERS, Measure
from interp.scorers.detection import Detection
from interp.scorers.fuzzing import Fuzzing
from interp.scorers.intruder import Intruder

EXAMPLES = planted()
SCORERS = [Detection(), Fuzzing()]
BOTH = pytest.mark.parametrize("scorer", SCORERS, ids=["detection", "fuzzing"])


def figures(scorer, text, abilities=SINGLE):
    score = scored(scorer, EXAMPLES, label(text), abilities)
    assert score.coverage == 1
    return {name: measure.value for name, measure in score.measures.items()}


@BOTH
def test_the_right_label_scores_one_everywhere(scorer):
    found = scored(scorer, EXAMPLES, label(RIGHT))
    assert found.n == len(EXAMPLES.test)
    assert found.measures["balanced_accuracy"].value == 1
    assert found.measures["balanced_accuracy"].low > 0.9
    for name, measure in found.measures.items():
        assert measure.value == 1, name


@BOTH
def test_a_label_of_another_latent_scores_a_half(scorer):
    found = figures(scorer, "words: stone, rock; after: wet")
    assert (found["balanced_accuracy"], found["tpr"], found["tnr"]) == (0.5, 0, 1)
    assert found["auroc"] == 0.5
    always = figures(scorer, "anything")  # true of every text
    assert (always["balanced_accuracy"], always["auroc"]) == (0.5, 0.5)
    assert always["precision_true_rate"] == pytest.approx(0.1)  # the true rate itself


@BOTH
def test_a_label_too_broad_loses_precision_and_one_too_narrow_recall(scorer):
    broad = figures(scorer, f"words: {', '.join([*FRUIT, *FILLER[:25]])}")
    assert broad["tpr"] == 1
    assert broad["precision_true_rate"] < 0.3
    narrow = figures(scorer, f"words: {FRUIT[0]}; after: ripe")
    assert 0.05 < narrow["tpr"] < 0.5
    assert narrow["precision_true_rate"] == 1
    assert narrow["tnr"] == 1


@BOTH
def test_hard_negatives_show_what_random_ones_hide(scorer):
    without_context = figures(scorer, f"words: {', '.join(FRUIT)}")
    assert without_context["balanced_accuracy"] == without_context["balanced_accuracy[neighbor]"] == 1
    assert without_context["balanced_accuracy[same_token]"] == 0.5
    context_alone = figures(scorer, "after: ripe")
    assert context_alone["balanced_accuracy"] == context_alone["balanced_accuracy[same_token]"] == 1
    assert context_alone["balanced_accuracy[neighbor]"] == 0.5


def test_a_label_that_is_true_of_strong_windows_alone_shows_in_the_deciles():
    strong = [
        replace(item, window=replace(item.window, text=item.window.text.replace("ripe", "best")))
        if item.decile >= 7
        else item
        for item in EXAMPLES.test
    ]
    score = scored(Detection(), replace(EXAMPLES, test=tuple(strong)), label("after: best"))
    assert [score.measures[f"recall_decile_{decile}"].value for decile in range(10)] == [0.0] * 7 + [1.0] * 3


@BOTH
@pytest.mark.parametrize("text", [RIGHT, f"words: {', '.join(FRUIT)}", "words: plum, the", "words: stone"])
def test_both_layouts_give_the_same_score(scorer, text):
    single, batch = (scored(scorer, EXAMPLES, label(text), abilities) for abilities in (SINGLE, BATCH))
    again = scored(replace(scorer, layout="batch", windows_per_request=7), EXAMPLES, label(text), SINGLE)
    alone = scored(replace(scorer, layout="window"), EXAMPLES, label(text), BATCH)
    for other in (batch, alone):
        assert (other.n, other.coverage, other.invalid) == (single.n, single.coverage, single.invalid)
        assert other.measures.keys() == single.measures.keys()
        for name, measure in other.measures.items():
            assert measure.value == pytest.approx(single.measures[name].value), name
    assert {name: m.value for name, m in again.measures.items()} == pytest.approx(
        {name: m.value for name, m in batch.measures.items()}
    )


def test_scores_are_deterministic_and_orders_differ_by_latent_and_scorer():
    assert scored(Detection(), EXAMPLES, label(RIGHT)) == scored(Detection(), EXAMPLES, label(RIGHT))
    orders = [
        [EXAMPLES.test.index(task.items[0]) for task in scorer.tasks(replace(EXAMPLES, latent=latent), "test", {})]
        for scorer in SCORERS
        for latent in (0, 1)
    ]
    assert all(sorted(order) == list(range(len(EXAMPLES.test))) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_token_lookup_needs_no_judge_and_misses_the_context():
    def refuse(chat):
        raise AssertionError("nobody is to be asked")

    (rule,) = TokenLookup().explanations(EXAMPLES, [])
    for scorer in SCORERS:
        found = scored(scorer, EXAMPLES, rule, answer=refuse).measures
        assert found["balanced_accuracy"].value == 1
        assert found["auroc"].value == 1
        assert found["balanced_accuracy[same_token]"].value == 0.5
        assert found["balanced_accuracy[neighbor]"].value == 1


# Intruder


def mixed(examples):
    """The examples of a latent whose active windows have nothing in common."""

    def alone(place, item):
        words = [word if word in FILLER else f"w{place}" for word in item.window.text.split()]
        return replace(item, window=make_window(words, section=item.window.section))

    return replace(examples, test=tuple(alone(n, item) for n, item in enumerate(examples.test)))


@pytest.mark.parametrize("abilities", [SINGLE, BATCH], ids=["choices", "ids"])
def test_the_intruder_is_found_where_texts_have_something_in_common(abilities):
    scorer = Intruder(questions=40)
    good = scored(scorer, EXAMPLES, label(""), abilities)
    assert (good.n, good.coverage) == (40, 1)
    assert good.measures["accuracy"].value == 1
    assert good.measures["chance"] == Measure(0.2, 0.2, 0.2)
    bad = scored(scorer, mixed(EXAMPLES), label(""), abilities).measures["accuracy"]
    assert bad.low < 0.2 < bad.high


def test_the_tiers_are_all_there():
    assert {item.tier for item in EXAMPLES.test} == {"active", *TIERS}
