"""The pace of late: what the start-up, a resume, answers from a cache and a change of speed do to the time left."""

import pytest

from sae.base.pace import SAMPLES, Pace
from sae.base.progress import Progress


def left(steps, total, start=0, at_once=1):
    """Returns the seconds left that are told after each of (seconds that it took, position, reused so far)."""
    now, told = [0.0], []
    shown = Progress("scoring", total, "latents", start, told.append, at_once, clock=lambda: now[0])
    for seconds, n, reused in steps:
        now[0] += seconds
        shown.update(n, reused)
    return [at.seconds_left for at in told[1:]]


def test_the_start_up_is_not_in_the_time_left():
    found = left([(300.0, 1, 0), *((1.0, n, 0) for n in range(2, 50))], 1000)
    assert found[0] is None
    assert found[1:] == pytest.approx([1000 - n for n in range(2, 50)])


def test_a_resume_does_not_count_what_was_done_before():
    assert left([(5.0, 901, 0), (2.0, 902, 0)], 1000, start=900) == [None, pytest.approx(2 * 98)]


def test_answers_that_were_there_do_not_shorten_the_time_left():
    from_cache = [(0.5, n, n) for n in range(100, 600, 100)]
    asked = [(10.0, n, 500) for n in range(501, 520)]
    found = left([*from_cache, *asked], 1000)
    assert found[:6] == [None] * 6
    assert found[6:] == pytest.approx([10.0 * (1000 - n) for n in range(502, 520)])


def test_work_side_by_side_is_told_of_once_its_first_wave_is_through():
    wave = [(10.0 if n % 64 == 0 else 0.2, n + 1, 0) for n in range(640)]  # the 64 of a wave end together
    found = left(wave, 6400, at_once=64)
    assert found[:64] == [None] * 64
    for n, seconds in list(enumerate(found, 1))[127::64]:  # at the end of each wave after the first
        assert seconds == pytest.approx((6400 - n) * (10.0 + 63 * 0.2) / 64, rel=1e-6)


def test_few_units_side_by_side_have_a_time_left_too():
    found = left([(60.0, 1, 0), *((1.0, n, 0) for n in range(2, 20))], 20, at_once=256)
    assert found[4] is None
    assert found[5] == pytest.approx(14.0)


def test_the_pace_follows_a_change_and_a_pause_passes():
    pace = Pace(0)
    for second in range(1, 101):
        pace.update(10 * second, second)
    assert pace.rate == pytest.approx(10)
    for second in range(101, 181):
        pace.update(1000 + second - 100, second)
    assert pace.rate == pytest.approx(1, rel=0.01)
    pace.update(1081, 400)
    assert pace.rate < 0.5
    for second in range(401, 600):
        pace.update(1081 + second - 400, second)
    assert pace.rate == pytest.approx(1, rel=0.01)


def test_slow_units_are_told_by_ten_of_them():
    pace = Pace(0)
    for n, now in enumerate((0, 100, 300, 400, 600, 700, 900, 1000, 1200, 1300, 1500), 1):
        pace.update(n, now)
    assert pace.rate == pytest.approx(10 / 1500)


def test_a_day_is_held_in_few_numbers():
    pace = Pace(0)
    for step in range(1, 100_000):
        pace.update(step, step * 0.8)
    assert len(pace.seen) <= 2 * SAMPLES
    assert pace.rate == pytest.approx(1 / 0.8)


def test_work_that_stands_still_has_no_rate():
    pace = Pace(0)
    for second in range(1, 200):
        pace.update(1, second)
    assert pace.rate is None
