"""One thread for the model: all that needs it is a generator, and each gets one step in its turn.

So two users never meet within a pass of the model, whose hooks belong to it and not to a request; a long answer keeps
nobody waiting for more than a token; and one that nobody waits for any more ends at its next step.
"""

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Generator, Hashable
from contextlib import suppress
from typing import Any

from interp.view.serving.limits import Limits
from interp.view.serving.refusing import Refused

Steps = Generator[Any, None, None]
"""Work in steps; what it yields is sent, None is not."""
_END = object()


class Turns:
    """The thread, and whose turn it is."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._changed = threading.Condition()
        self._open: deque[_Work] = deque()
        self._waiting: deque[_Work] = deque()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="turns", daemon=True)
        self._thread.start()

    async def pieces(self, steps: Steps, who: Hashable = None) -> AsyncIterator[Any]:
        """Yields what some work yields; whatever it raises is raised here. Leaving early ends the work.

        Of several that wait the first one of whom the least is under way comes next. Refused if too many wait (429),
        if it takes too long, or the server ends (503).
        """
        work = _Work(steps, who, self.limits.seconds)
        with self._changed:
            if self._ended:
                raise Refused(503, "the server ends")
            if len(self._waiting) >= self.limits.waiting:
                raise Refused(429, f"{self.limits.waiting} requests wait already; try again later", wait_s=5)
            self._waiting.append(work)
            self._changed.notify()
        try:
            while (piece := await work.queue.get()) is not _END:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            work.left = True
            with self._changed:
                if work in self._waiting:
                    self._waiting.remove(work)

    async def one(self, steps: Steps, who: Hashable = None) -> Any:
        """Returns the last piece that some work yields."""
        last = None
        async for piece in self.pieces(steps, who):
            last = piece
        return last

    def end(self) -> None:
        """Ends all work at its next step, and takes no more."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def join(self, timeout: float) -> None:
        """Waits until the step that is under way has ended."""
        self._thread.join(timeout)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            if work.step(self._ended):
                with self._changed:
                    self._open.append(work)

    def _next(self) -> "_Work | None":
        """Returns whose turn it is, waiting for somebody; None at the end, when nobody is left."""
        with self._changed:
            while not (self._open or self._waiting):
                if self._ended:
                    return None
                self._changed.wait()
            while self._waiting and (len(self._open) < self.limits.open or self._ended):
                under_way = Counter(work.who for work in self._open)
                work = min(self._waiting, key=lambda work: under_way[work.who])
                self._waiting.remove(work)
                self._open.append(work)
            return self._open.popleft()


class _Work:
    """A generator whose pieces go to the loop of who asked."""

    def __init__(self, steps: Steps, who: Hashable, seconds: float) -> None:
        self.steps, self.who, self.seconds = steps, who, seconds
        self.until = time.monotonic() + seconds
        self.left = False
        """Whether nobody waits for it any more."""
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def step(self, ended: bool) -> bool:
        """Takes one step, and returns whether there may be more."""
        try:
            if ended:
                raise Refused(503, "the server ends")
            if self.left:
                raise StopIteration
            if time.monotonic() > self.until:
                raise Refused(503, f"this takes more than {self.seconds:g} s; ask for less, or when fewer others do")
            self._put(next(self.steps))
            return True
        except StopIteration:
            self._put(_END)
        except BaseException as error:
            self._put(error)
        with suppress(Exception):
            self.steps.close()
        return False

    def _put(self, piece: Any) -> None:
        if piece is not None:
            try:
                self._loop.call_soon_threadsafe(self.queue.put_nowait, piece)
            except RuntimeError:  # the loop has ended, and with it who asked
                self.left = True
