"""How fast work goes, as it has gone of late: for a time left that a person can trust."""

from collections import deque

WINDOW_S = 60.0
LEAST_UNITS = 10
SHARE = 0.25
SAMPLES = 400


class Pace:
    """The rate of a stage over the last quarter of its time, at least a minute and ten units.

    What is done first tells nothing: it takes the start-up (compilation, connections, models that load) with it. Of
    work of which several units are under way at once, the first of them end together, after the time of one. So the
    clock starts when `warming` units (one at least) are done.
    """

    def __init__(self, first: float, warming: int = 1) -> None:
        self.after = first + max(1, warming)
        self.seen = deque[tuple[float, float]]()
        """Times and what was done by then, thinned out, the oldest first; and the position of now."""
        self.now: tuple[float, float] | None = None

    def update(self, n: float, now: float) -> None:
        """Takes in that `n` units are done by `now`, in seconds."""
        if n < self.after:
            return
        if not self.seen:
            self.seen.append((now, n))
            self.began = now
        self.now = now, n
        elapsed = now - self.began
        if now - self.seen[-1][0] >= max(WINDOW_S, SHARE * elapsed) / SAMPLES:
            self.seen.append(self.now)
        window = max(WINDOW_S, SHARE * elapsed)
        while len(self.seen) > 1 and now - self.seen[1][0] >= window and n - self.seen[1][1] >= LEAST_UNITS:
            self.seen.popleft()

    @property
    def rate(self) -> float | None:
        """Returns units per second; None before anything tells it."""
        if self.now is None:
            return None
        (then, before), (now, n) = self.seen[0], self.now
        return (n - before) / (now - then) if now > then and n > before else None
