"""What ranks agree on besides tensors: that all came through, and what rank 0 has decided.

They wait for each other on keys of a store, not in a collective: one of them may tokenize or evaluate for hours.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from sae.base.errors import Stopped
from sae.base.progress import during
from sae.parallel import ranks
from sae.parallel.judging import WAITING
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

    A rank that waits for one that is gone would wait for ever. So would one that waits, within the block, for what
    another one does not come to since it has failed there: that waiting ends, too.
    """
    failed, code, group = None, 0.0, ranks.group()
    with group.block() if group else nullcontext():
        try:
            yield
        except Exception as error:
            failed, code = error, getattr(error, "exit_code", 1)
            code = STOPPED if code == Stopped.exit_code else code
            if group:
                with group.heart.explained():
                    group.store.set(group.failures[-1], json.dumps(code))
    try:
        worst = concluded(code, max)
    finally:
        if failed:
            raise known(failed)
    if worst:
        raise known(_elsewhere(worst))


def _elsewhere(code: float) -> Exception:
    return Stopped("with another rank") if code == STOPPED else PeerError(int(code))


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
    key = f"decided{group.next_key()}"
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
    key = f"met{group.next_key()}"
    with during(WAITING):
        with group.heart.explained():
            group.store.set(f"{key}/{ranks.rank()}", json.dumps(value))
        if ranks.rank() == 0:
            told = _told(group, [f"{key}/{i}" for i in range(len(group.peers))])
            found = json.dumps(conclude([json.loads(text) for text in told]))
            with group.heart.explained():
                group.store.set(key, found)
        return json.loads(_told(group, [key])[0])


def _told(group: ranks.Group, keys: list[str]) -> list[bytes]:
    """Returns what the keys hold once all are set; raises if a rank has failed in a block that is open."""
    store, failures = group.store, group.failures
    with group.heart.explained():
        wait_for(store, keys, other=lambda: any(store.check([key]) for key in failures))
        if store.check(keys):  # also where one has failed just after
            return store.multi_get(keys)
        code = next(json.loads(store.get(key)) for key in failures if store.check([key]))
    raise known(_elsewhere(code))
