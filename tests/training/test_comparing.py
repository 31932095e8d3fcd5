"""Runs beside each other: who is compared with whom, and what speaks against it."""

from rigs.recorded import recorded

from sae.training.reporting.comparing import differences, doubts, pairs
from sae.training.reporting.recorded import read_run


def test_coders_correspond_by_name_or_as_the_only_ones():
    a, b, c = ({"run": 0, "name": "k=8"}, {"run": 0, "name": "k=16"}, {"run": 1, "name": "k=16"})
    assert pairs([a, b, c], 2) == [[0, None], [1, 2]]
    assert pairs([a, c], 2) == [[0, 1]]
    assert pairs([a], 2) == [[0, None]]


def test_only_what_differs_is_told():
    a, b = {"run_dir": "x", "seed": 0, "lr": 0.1, "k": [8]}, {"run_dir": "y", "seed": 0, "lr": 0.2}
    assert differences([a, b]) == [["k", "[8]", None], ["lr", "0.1", "0.2"]]


def test_what_differs_is_told_without_where_it_lies():
    runs = [{"text.source": f"/home/{who}/texts/a.txt", "sites": [f"/home/{who}/x/y", 1]} for who in ("me", "you")]
    told = [["sites", *["['x/y', 1]"] * 2], ["text.source", *["texts/a.txt"] * 2]]
    assert differences(runs) == told


def test_figures_of_other_text_or_of_a_run_that_goes_on_are_doubted(tmp_path):
    runs = [
        read_run(recorded(tmp_path / name, {"a": (0.2, 8.0)}, finished=done), name)
        for name, done in (("x", 1), ("y", 0))
    ]
    found = doubts([["text.source", "u", "v"], ["optim.lr", "1", "2"], ["activations.lanes", "1", "2"]], runs)
    assert found == [
        "Held-out figures were not measured on the same: text.source differ.",
        "Not finished: y; figures are those of the step that is told.",
    ]
    assert not doubts([["optim.lr", "1", "2"]], runs[:1])
