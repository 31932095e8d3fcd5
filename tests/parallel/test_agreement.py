"""Ranks that fail where others already wait for something else: none waits for ever, and they still count alike."""

from functools import partial

import pytest
from rigs.children import Child, ranks

from sae.base.errors import ConfigError, Stopped
from sae.parallel.agreement import PeerError, agreed, together
from sae.parallel.desk import Desk
from sae.parallel.ranks import RanksConfig, process_group, rank


def meet() -> None:
    with together():
        pass


def decide() -> None:
    agreed(lambda: 1)
    meet()


def deeply() -> None:
    with together():
        meet()


def by_thread() -> None:
    desk = Desk()
    desk.put(f"{rank()}", "here")
    desk.get("1" if rank() == 0 else "0")


def fail(error: Exception) -> None:
    raise error


MEETINGS = [meet, decide, deeply, by_thread]


def one_fails(failing: int, error: Exception) -> int:
    """One rank fails before each meeting within a block; all must come out of it, each with what it knows."""
    with process_group(RanksConfig(deadline_s=60)):
        for number, meeting in enumerate(MEETINGS):
            with pytest.raises(type(error) if rank() == failing else (PeerError, Stopped)), together():
                fail(error) if rank() == failing else meeting()
            assert agreed(lambda n=number: n) == number, "all still count alike"
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "error"),
    [(0, ConfigError("no")), (1, ConfigError("no")), (1, Stopped("here")), (0, RuntimeError("no"))],
)
def test_a_rank_that_fails_before_a_meeting_within_a_block_keeps_nobody_waiting(tmp_path, failing, error):
    work = partial(one_fails, failing, error)
    children = [Child(tmp_path / env["RANK"], work, env) for env in ranks(2)]
    assert [child.wait() for child in children] == [0, 0], [child.output for child in children]
