"""Amounts as people say them."""

import pytest

from sae.base.units import data_size, duration, per_time


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (89, "89 s"), (600, "10 min"), (12240, "3.4 h")])
def test_durations_as_people_say_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1300, "1.3 kB"), (5e8, "500 MB"), (2e15, "2e+03 TB")]
)
def test_sizes_as_people_say_them(count, text):
    assert data_size(count) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (1234.5, "1,234 steps/s"),
        (12.34, "12.3 steps/s"),
        (0.25, "15 steps/min"),
        (0.01, "36 steps/h"),
        (1e-4, "0.36 steps/h"),
    ],
)
def test_rates_as_people_say_them(rate, text):
    assert per_time(rate, "steps") == text
