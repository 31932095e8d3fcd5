import json
from dataclasses import asdict

import pytest

from sae.parallel.judging import WAITING, Beat, Heard, Peer, judged

DEADLINE, TIMEOUT = 60.0, 600.0


class Ranks:
    """What rank 0 has heard of three, all of them at `now`."""

    def __init__(self) -> None:
        self.now, self.count = 0.0, 0
        self.heard = [Heard(Peer(i, f"n{i}", 10 + i, "cpu")) for i in range(3)]
        self.hear(0, 1, 2)

    def hear(self, *ranks: int, **said) -> None:
        for rank in ranks:
            self.count += 1
            self.heard[rank].hear(
                Beat(self.count, **{"doing": "training at step 118", **said}).to_json().encode(), self.now
            )

    def judged(self, me: int = 0):
        heard = self.heard if me == 0 else self.heard[:1]
        return judged(heard, me, self.now, DEADLINE, TIMEOUT)


def test_a_beat_is_read_as_it_was_told():
    beat = Beat(3, "saving", 7, True, "SIGTERM", 1, "no", True, ("failed: x", 2))
    assert json.dumps(asdict(Beat.from_json(beat.to_json().encode()))) == json.dumps(asdict(beat))


def test_all_that_are_silent_are_named_with_what_they_did():
    ranks = Ranks()
    ranks.now = 61.0
    ranks.hear(0)
    silent = "rank {0} (n{0}, pid 1{0}) was last heard 61 s ago, training at step 118"
    assert ranks.judged() == (f"{silent.format(1)}; {silent.format(2)}", 1)
    ranks.hear(2)
    assert ranks.judged() == (silent.format(1), 1)
    ranks.hear(1)
    assert ranks.judged() is None


def test_a_store_that_gives_the_same_again_is_not_a_sign_of_life():
    ranks = Ranks()
    ranks.now = 61.0
    for one in ranks.heard[1:]:
        one.hear(one.text, ranks.now)
    assert ranks.judged() is not None


def test_one_that_has_ended_while_another_waits_for_it_is_named():
    ranks = Ranks()
    ranks.hear(2, left=True)
    for now, expected in (
        (50.0, None),
        (70.0, ("rank 2 (n2, pid 12) has ended, and rank 1 (n1, pid 11) waits for it", 1)),
    ):
        ranks.now = now
        ranks.hear(0)
        ranks.hear(1, doing=f"saving, {WAITING}")
        assert ranks.judged() == expected


def test_one_that_has_left_may_be_silent():
    ranks = Ranks()
    ranks.hear(1, left=True)
    ranks.now = 1000.0
    ranks.hear(0, 2)
    assert ranks.judged() is None


def test_a_broken_sum_shortens_the_wait_for_the_one_that_must_be_dead():
    ranks = Ranks()
    ranks.now = 14.0
    ranks.hear(0, 2, broken="Connection closed by peer")
    assert ranks.judged() is None
    ranks.now = 16.0
    ranks.hear(0, 2, broken="Connection closed by peer")
    assert ranks.judged() == ("rank 1 (n1, pid 11) was last heard 16 s ago, training at step 118", 1)


def test_a_broken_sum_of_ranks_that_all_live_is_told_in_the_end():
    ranks = Ranks()
    for ranks.now in range(0, 61, 5):
        ranks.hear(0, 1)
        ranks.hear(2, broken="Timed out")
        assert ranks.judged() is None
    ranks.now = 61.0
    assert ranks.judged() == ("a sum over ranks failed at rank 2 (n2, pid 12): Timed out; every rank lives", 1)


@pytest.mark.parametrize("inside", [True, False])  # what sums between GPUs lets the main thread go on
def test_a_rank_that_lives_but_does_not_come_to_a_sum_is_named(inside):
    ranks = Ranks()
    ranks.now = 1.0
    ranks.hear(0, 2, begun=5, inside=inside)
    ranks.hear(1, begun=4, doing="training at step 117")
    ranks.now = 600.0
    ranks.hear(0, 2, begun=5, inside=inside)
    ranks.hear(1, begun=4, doing="training at step 117")
    assert ranks.judged() is None
    ranks.now = 602.0
    assert ranks.judged() == (
        "a sum over ranks has taken longer than ranks.timeout_s, 600 s: "
        "rank 1 (n1, pid 11) has not come to it, training at step 117",
        1,
    )


def test_ranks_that_wait_for_rank_0_outside_of_a_sum_may_wait_for_long():
    ranks = Ranks()
    ranks.hear(0, 1, 2, begun=5)
    ranks.now = 10_000.0
    ranks.hear(0, 1, 2, begun=5)
    assert ranks.judged() is None


def test_one_that_fails_is_told_of_after_the_others_had_time_to_fail_alike():
    ranks = Ranks()
    ranks.hear(2, verdict=("failed: no luck", 2), left=True)
    assert ranks.judged() is None
    ranks.now = 1.1
    assert ranks.judged() == ("rank 2 (n2, pid 12) failed: no luck", 2)


def test_the_verdict_of_rank_0_is_that_of_the_others():
    ranks = Ranks()
    assert ranks.judged(me=1) is None
    ranks.hear(0, verdict=("rank 2 was last heard ...", 1))
    assert ranks.judged(me=1) == ("rank 2 was last heard ...", 1)


def test_the_others_judge_rank_0_by_themselves():
    ranks = Ranks()
    ranks.now = 61.0
    assert ranks.judged(me=2) == ("rank 0 (n0, pid 10) was last heard 61 s ago, training at step 118", 1)
