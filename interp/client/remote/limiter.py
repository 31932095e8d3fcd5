"""How many requests may be under way at once: fewer while the server is overloaded, none while it asks for a pause.

Additive increase, multiplicative decrease, as in TCP: every success raises the limit by 1/limit, an overload halves
it, and failures of requests that were sent before the last cut do not count again. All requests of an endpoint share
one limiter, so that one answer of "too many" slows all of them.
"""

import asyncio
import contextlib
import random
from collections import deque
from dataclasses import dataclass

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
LONGEST_RETRY_AFTER_S = 120.0
"""A server that asks for more is left alone: what waits fails at once and can be asked again later."""
DOWN_S = 30.0
"""How long nothing is sent to a server that answers nobody."""
_JITTER = random.Random()  # decides about time alone, never about a result


@dataclass(eq=False)
class Closed(Exception):
    """Nothing is sent: why, as a Reply tells it."""

    failure: str
    detail: str


class Limiter:
    """Grants turns to the requests of one endpoint."""

    def __init__(self, most: int) -> None:
        self.most, self.limit, self.active = most, float(most), 0
        self._waiting: deque[asyncio.Future[float]] = deque()
        self._closed: Closed | None = None
        self._closed_until = self._resume_at = self._cut_at = 0.0
        self._streak = self.answered = 0
        self._shut = asyncio.Event()

    async def enter(self) -> float:
        """Returns when it is a request's turn, the time of the loop's clock; Closed if there will be none."""
        self._reopen()
        if self._closed is not None:
            raise Closed(self._closed.failure, self._closed.detail)
        turn: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._wake()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave()
            raise

    def leave(self) -> None:
        """Ends a turn."""
        self.active -= 1
        self._wake()

    def succeeded(self) -> None:
        """Notes an answer."""
        self._streak = 0
        self.answered += 1
        self.limit = min(self.most, self.limit + 1 / self.limit)

    def overloaded(self, started: float, wait_s: float | None, pause: bool) -> None:
        """Notes that the server had too much to do, for a request sent at `started`.

        Args:
            started: what `enter` returned.
            wait_s: what the server asked for; None where it did not say.
            pause: whether all requests must wait even so.
        """
        if wait_s is not None and wait_s > LONGEST_RETRY_AFTER_S:
            self.close("rate_limit", f"the server wants to be left alone for {wait_s:.0f} s", wait_s)
            return
        if started >= self._cut_at:
            self._cut_at = _now()
            self.limit = max(1.0, self.limit / 2)
            self._streak += 1
        if wait_s is not None or pause:
            self._pause(wait_s if wait_s is not None else backoff(self._streak))

    def down(self, failure: str, detail: str) -> None:
        """Notes that a server answers nobody."""
        if not self.closed:
            self.close(failure, f"given up for {DOWN_S:.0f} s: {detail}", DOWN_S)

    @property
    def closed(self) -> bool:
        """Returns whether nothing is sent at present."""
        self._reopen()
        return self._closed is not None

    def close(self, failure: str, detail: str, for_s: float = float("inf")) -> None:
        """Has everything that waits, and all that comes within `for_s`, fail at once."""
        self._closed, self._closed_until = Closed(failure, detail), _now() + for_s
        self._shut.set()
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(self._closed)

    async def rest(self, seconds: float) -> None:
        """Waits between two tries of a request, or until the endpoint is closed."""
        self._reopen()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._shut.wait(), seconds)

    def _reopen(self) -> None:
        if self._closed is not None and _now() >= self._closed_until:
            self._closed = None
            self._shut.clear()

    def _free(self) -> bool:
        return self.active < int(self.limit) and _now() > self._resume_at - 0.01  # timers may be a little early

    def _pause(self, seconds: float) -> None:
        until = _now() + seconds
        if until > self._resume_at:
            self._resume_at = until
            asyncio.get_running_loop().call_at(until, self._wake)

    def _wake(self) -> None:
        while self._waiting and self._free():
            turn = self._waiting.popleft()
            if not turn.done():
                self.active += 1
                turn.set_result(_now())


def backoff(tries: int) -> float:
    """Returns how long to wait after so many failures (at least 1), in seconds: doubling, with jitter."""
    return _JITTER.uniform(0.5, 1.0) * min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**tries)


def _now() -> float:
    return asyncio.get_running_loop().time()
