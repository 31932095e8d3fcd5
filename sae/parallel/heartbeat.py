"""Two threads per rank by which ranks know of each other: who is lost, who has failed, who was asked to stop.

One talks: it tells a store what this rank does, and reads what the others tell. Rank 0 reads all and gives the verdict;
the others read rank 0. The other judges, by what was heard and by a clock of this process alone, so that a store that
does not answer, whose process is frozen, does not hold it up. It ends the process whatever the main thread sits in.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from sae.base.errors import Stopped
from sae.base.progress import doing
from sae.parallel import stopping
from sae.parallel.judging import Beat, Heard, Peer, Verdict, judged

BEATS, LOOKS = 12, 48  # in a deadline
LONGEST_LOOK_S = 1.0
FAREWELL_S = 2.0
"""How long rank 0 waits for the others to read why they end; without it, they only see that rank 0 is gone."""


class Heartbeat:
    """The threads, while its context lasts; of an error that ends the context, and is this rank's alone, all are told.

    `store` is of the one thread alone: a call of the main thread's may wait for long.
    """

    def __init__(self, store: Store, peers: list[Peer], rank: int, deadline_s: float, timeout_s: float) -> None:
        self.store, self.rank, self.deadline, self.timeout = store, rank, deadline_s, timeout_s
        self.look = min(LONGEST_LOOK_S, deadline_s / LOOKS)
        self.heard = [Heard(peer) for peer in peers if rank == 0 or peer.rank == 0]
        self.main, self.last = threading.get_ident(), Beat()
        self.begun, self.inside, self.broken, self.left = 0, False, "", False
        self.verdict: Verdict | None = None
        self.gone = ""
        """Why the store is out of reach."""
        self.known: BaseException | None = None
        """An error of which all ranks were told, so that each ends by itself."""
        self.clock = 0.0
        """Seconds for which this process ran: one that was suspended has not waited for the others."""
        self.wanted = self.told = 0
        self.wake, self.over = threading.Event(), threading.Event()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]

    def __enter__(self) -> "Heartbeat":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None and not self._knows(error):
            what = "stopped" if isinstance(error, Stopped) else "failed:"
            self.verdict = f"{what} {_line(error)}", getattr(error, "exit_code", 1)
        self.left = True
        self._have_told(self.deadline)
        if self.rank == 0:  # whose process has the store
            self._see_off(self.timeout)
        self.over.set()
        self.wake.set()
        for thread in self.threads:
            thread.join(self.look)

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Counts a collective. One that fails, since another rank is gone, waits for the verdict, which says who."""
        self.begun, self.inside = self.begun + 1, True
        try:
            with self.explained():
                yield
        finally:
            self.inside = False

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Has an error of the block, a connection that broke, wait for the verdict: it ends the process."""
        try:
            yield
        except RuntimeError as error:
            self.broken = _line(error)
            self._have_told(self.look)
            time.sleep(2 * self.deadline + FAREWELL_S)
            raise

    def _knows(self, error: BaseException | None) -> bool:
        while error is not None and error is not self.known:
            error = error.__cause__ or error.__context__
        return error is not None

    def _talk(self) -> None:
        said = float("-inf")
        try:
            while not self.over.is_set():
                wanted, now = self.wanted, time.monotonic()
                if wanted > self.told or now - said >= self.deadline / BEATS or stopping.asked() != self.last.signal:
                    said = now
                    self._tell()
                    self.told = wanted
                self._listen()
                self.wake.wait(self.look)
                self.wake.clear()
        except Exception as error:
            self.gone = _line(error)
        self.told = self.wanted + 1

    def _tell(self) -> None:
        verdict = self.verdict if self.rank == 0 or self.left else None
        at = doing(self.main) or ("starting" if self.last.doing == "starting" else "between stages")
        asked = next((one.peer.rank for one in self.heard if one.beat.signal), -1)
        self.last = Beat(
            self.last.count + 1,
            at,
            self.begun,
            self.inside,
            stopping.asked(),
            asked if self.rank == 0 else -1,
            self.broken,
            self.left,
            verdict,
        )
        self.store.set(f"beat/{self.rank}", self.last.to_json())

    def _listen(self) -> None:
        there = [one for one in self.heard if one.text or self.store.check([f"beat/{one.peer.rank}"])]
        texts = self.store.multi_get([f"beat/{one.peer.rank}" for one in there])
        for one, text in zip(there, texts, strict=True):
            one.hear(text, self.clock)
        if self.rank == 0 and self.last.asked < 0:
            for one in self.heard:
                if one.beat.signal and self.last.asked < 0:
                    if one.peer.rank:
                        stopping.say(f"{one.peer} got {one.beat.signal}: all stop as soon as can be")
                    self._tell()
        if self.last.asked >= 0 or (self.rank and self.heard[0].beat.asked >= 0):
            stopping.peer_stops()

    def _have_told(self, patience: float) -> None:
        """Tells the others at once how it stands with this rank."""
        self.wanted += 1
        wanted, end = self.wanted, time.monotonic() + patience
        self.wake.set()
        while self.told < wanted and time.monotonic() < end:
            time.sleep(0.002)

    def _see_off(self, patience: float) -> None:
        """Waits for all that are still heard to leave."""
        others, end = [one for one in self.heard if one.peer.rank], time.monotonic() + patience
        while not self.gone and time.monotonic() < end:
            if all(one.beat.left or one.silent(self.clock, self.deadline) for one in others):
                return
            time.sleep(self.look / 4)

    def _judge(self) -> None:
        last = time.monotonic()
        while not self.over.wait(self.look):
            now = time.monotonic()
            self.clock, last = self.clock + min(now - last, self.deadline / 4), now
            verdict = judged(self.heard, self.rank, self.clock, self.deadline, self.timeout)
            if verdict is None and self.gone:
                verdict = f"the connection to rank 0 broke ({self.gone}): {self.heard[0].said(self.clock)}", 1
            if verdict is not None and not self.left:
                self._end(*verdict)

    def _end(self, text: str, code: int) -> None:
        stopping.say(f"error: {text}; all ranks end")
        self.verdict, self.left = (text, code), self.rank != 0
        self._have_told(self.look)
        if self.rank == 0:
            self._see_off(FAREWELL_S)
        os._exit(code)


def _line(error: BaseException) -> str:
    """Returns an error in one line, without what C++ adds to it."""
    text = str(error).split("\nException raised from")[0].split("frame #")[0]
    return " ".join(text.split())[:300] or type(error).__name__
