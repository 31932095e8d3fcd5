"""Fuzzing: does the judge tell the tokens on which a latent fires from others (arXiv 2410.13928, section 4.2)?

As detection, but tokens are marked: in active windows those on which the latent fires most, in silent ones as many at
the same places as in an active one, so that the marks themselves tell nothing. A rule decides by the marked tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

from interp.prompts.judging import FUZZING
from interp.records import Item
from interp.scorers import Scorer
from interp.scorers.detection import Detection


@Scorer.register_subclass("fuzzing")
@dataclass(frozen=True)
class Fuzzing(Detection):
    """Asks whether a description fits what is marked in a text."""

    question: ClassVar[str] = FUZZING

    def marks(self, item: Item) -> tuple[int, ...]:
        """Returns the item's marks."""
        return item.marks

    def usable(self, item: Item) -> bool:
        """Returns whether the item has marks."""
        return bool(item.marks)
