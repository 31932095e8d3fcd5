"""What is drawn is what was logged."""

import math

import numpy as np

from sae.training.reporting.curves import curves, held_out_curves, thinned


def test_curves_are_the_logged_values_over_tokens():
    lines = [{"step": i, "coder": "a", "fvu": 1 / i, "tokens": 999} for i in range(1, 6)]
    found, said = curves(lines, 1024, 100)
    assert found == {"fvu": {"x": [1024 * i for i in range(1, 6)], "y": [1 / i for i in range(1, 6)]}}
    assert not said


def test_what_is_no_number_is_a_gap_and_told():
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf}, {"step": 4}]
    found, said = curves(lines, 1, 100)
    assert found["loss"]["y"] == [1.0, None, None, None]
    assert said == ["2 values are no finite numbers: they are gaps in the curves."]


def test_of_a_step_that_was_logged_again_the_last_line_is_drawn_and_that_is_told():
    found, said = curves([{"step": s, "loss": v} for s, v in ((1, 1.0), (2, 9.0), (2, 2.0), (3, 3.0))], 1, 100)
    assert found["loss"] == {"x": [1, 2, 3], "y": [1.0, 2.0, 3.0]}
    assert said == ["1 steps were logged again or out of order; of each, the last is drawn."]


def test_thin_curves_keep_their_ends_and_every_peak():
    values = np.sin(np.arange(100_000) / 50)
    values[[54_321, 77_777, 10, 11]] = 9.0, -9.0, math.nan, math.inf
    places = thinned(values, 2000)
    assert len(places) <= 2000
    assert places == sorted(set(places))
    assert {0, 99_999, 54_321, 77_777} <= set(places)
    assert len(thinned(np.full(5000, math.nan), 100)) <= 100
    assert thinned(values[:100], 100) == list(range(100))


def test_held_out_figures_stand_where_they_were_measured():
    some = [
        (20, {"reconstruction": {"fvu": 0.2, "l0": 8.0}, "loss": {"ce_recovered": None}}),
        (10, {"reconstruction": {"fvu": 0.4, "l0": 8.0}}),
    ]
    assert held_out_curves(some, 2) == {"fvu": {"x": [20, 40], "y": [0.4, 0.2]}, "l0": {"x": [20, 40], "y": [8.0, 8.0]}}
