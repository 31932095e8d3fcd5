"""A rank that is killed or frozen, in any phase: the others say which it was and end, and the run can go on."""

import signal
import time

import pytest
from rigs.losses import DEADLINE_S, PHASES, SIGNALS, SLACK_S, Draw, Losses, draws
from rigs.runs import assert_equal


@pytest.fixture(scope="module")
def losses(tmp_path_factory, tiny_model, tiny_text):
    return Losses(tmp_path_factory.mktemp("losses"), tiny_model, tiny_text)


QUICK = Draw(2, 1, "training", signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [QUICK, *draws(8)], ids=str)
def test_the_others_name_the_lost_rank_in_time_and_the_run_goes_on_as_if_nothing_had_happened(losses, draw):
    outcome = losses.lose(draw)
    assert outcome.codes == [1] * (draw.n - 1), outcome.output
    assert all(outcome.named), outcome.output
    assert outcome.seconds < DEADLINE_S + SLACK_S


def test_draws_go_through_phases_ranks_and_signals():
    found = draws(40)
    assert len(set(found)) == len(found)
    assert {draw.phase for draw in found} == set(PHASES)
    assert {draw.signal for draw in found} == set(SIGNALS)
    assert {(draw.n, draw.rank) for draw in found} == {(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)}


@pytest.mark.slow
def test_ranks_that_are_all_suspended_for_long_go_on(losses, tmp_path):
    children = losses.start(tmp_path / "run", 2)
    children[0].wait_for((tmp_path / "run" / "checkpoints" / "step-000000005").exists)
    for child in children:
        child.kill(signal.SIGSTOP)
    time.sleep(2 * DEADLINE_S)
    children[0].kill(signal.SIGCONT)
    time.sleep(0.3 * DEADLINE_S)  # hosts of a job do not wake up at once
    children[1].kill(signal.SIGCONT)
    assert [child.wait() for child in children] == [0, 0], [child.output for child in children]
    assert_equal(tmp_path / "run", losses.whole(2))
