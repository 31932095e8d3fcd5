"""The page of a server: the report of an explained run, with panels that ask the model (assets/live*.js)."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from interp.view.explained import ExplainedRun
from interp.view.reporting.report import SCRIPTS, START, STYLE, Report
from sae.pages.page import Asset, page

NAMES = ("live", "live_tokens", "live_try", "live_search", "live_steer", "live_written", "live_notes", "live_test")
LIVE_SCRIPTS: tuple[Asset, ...] = tuple(("interp.view", f"{name}.js") for name in NAMES)
LIVE_STYLE: Asset = ("interp.view", "live.css")


class LivePage:
    """The page of a run, whose blocks are made when they are asked for."""

    def __init__(self, run: ExplainedRun) -> None:
        self._report = Report([run])

    def html(self) -> Iterable[str]:
        """Returns the page in parts; all its data is asked for."""
        return page(self._report.title, (*SCRIPTS, *LIVE_SCRIPTS, START), [], (STYLE, LIVE_STYLE), live=True)

    def block(self, name: str) -> Any:
        """Returns the value of a block: "main", or a part of the latents; KeyError if there is none."""
        return self._main if name == "main" else self._report.block(name)

    @cached_property
    def _main(self) -> dict[str, Any]:
        return self._report.main(live=True)
