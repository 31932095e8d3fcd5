"""An explained run of a tiny model, served as sae-view --serve does it, but for the page's own scripts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rigs.serving import Asks, running

from interp.view.opening import open_run
from interp.view.serving.app import app
from interp.view.serving.guards import Access
from interp.view.serving.limits import Limits
from interp.view.serving.served import Served


class Plain:
    """A page of nothing but what a test looks for."""

    policy = "default-src 'none'; script-src 'sha256-x'"

    def html(self) -> list[str]:
        policy = self.policy.replace("'", "&#39;")
        return [f'<meta http-equiv="Content-Security-Policy" content="{policy}">', "<p>page"]

    def block(self, name: str) -> Any:
        return {"main": {"a": 1}, "0/3": {"b": 2}}[name]


def opened(folder: Path, limits: Limits | None = None) -> Served:
    found = open_run(folder)
    assert found.run is not None
    return Served(found.run, found.coder, found.lm, limits or Limits(burst=10_000, a_second=10_000))


@contextmanager
def served_at(served: Served, token: str = "", page: Any = None) -> Iterator[Asks]:
    access = Access("127.0.0.1", served.limits, token)
    with running(lambda turns: app(served, page or Plain(), access, turns), served.limits) as asks:
        yield asks
