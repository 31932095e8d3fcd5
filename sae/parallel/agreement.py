"""What ranks agree on besides tensors: that all came through, and what rank 0 has decided.

They wait for each other on keys of a store, not in a collective: one of them may tokenize or evaluate for hours.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sae.base.errors import Stopped
from sae.base.progress import during
from sae.parallel import ranks
from sae.parallel.meeting import wait_for

Known = TypeVar("Known", bound=BaseException)
STOPPED = 0.5  # less than any error: where one rank failed and another was stopped, the third tells of the failure


class PeerError(RuntimeError):
    """The error of another rank, which says what it is; the exit code is the same."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another rank failed, and said why")
        self.exit_code = exit_code


@contextmanager
def together() -> Iterator[None]:
    """Waits for all ranks at the end of the block, and ends them all if it failed on one.

    A rank that waits for one that is gone would wait for ever.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    code = getattr(failed, "exit_code", 1) if failed else 0
    worst = concluded(code if code != Stopped.exit_code else STOPPED, max)
    if failed:
        raise known(failed)
    if worst:
        raise known(Stopped("with another rank") if worst == STOPPED else PeerError(int(worst)))


def known(error: Known) -> Known:
    """Returns an error that every rank raises, or hears of, by itself: then none has to end the others."""
    if group := ranks.group():
        group.heart.known = error
    return error


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Lets rank 0 fill a cache that the others then read."""
    if ranks.rank() == 0:
        with together():
            yield
        with together():
            pass
    else:
        with together():
            pass
        with together():
            yield


def agreed(decide: Callable[[], Any]) -> Any:
    """Returns what rank 0 decides, plain JSON values, on every rank; its error ends all."""
    group = ranks.group()
    if group is None:
        return decide()
    key = f"decided/{next(group.numbers)}"
    with together():
        if ranks.rank() == 0:
            decided = json.dumps(decide())
            with group.heart.explained():
                group.store.set(key, decided)
    with group.heart.explained():
        return json.loads(group.store.get(key))


def concluded(value: Any, conclude: Callable[[list[Any]], Any]) -> Any:
    """Returns, on every rank, what rank 0 concludes of the values of all, in their order; plain JSON values."""
    group = ranks.group()
    if group is None:
        return conclude([value])
    key = f"met/{next(group.numbers)}"
    store, explained = group.store, group.heart.explained
    with during("waiting for the others"):
        with explained():
            store.set(f"{key}/{ranks.rank()}", json.dumps(value))
        if ranks.rank() == 0:
            every = [f"{key}/{i}" for i in range(len(group.peers))]
            with explained():
                wait_for(store, every)
                told = store.multi_get(every)
            found = json.dumps(conclude([json.loads(text) for text in told]))
            with explained():
                store.set(key, found)
        with explained():
            wait_for(store, [key])
            return json.loads(store.get(key))
