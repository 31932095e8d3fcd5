"""Explainers: from what is shown of a latent to a text that says what it means. One file each.

    examples -> requests -> replies -> explanations

An explainer sees the explain split alone. One that asks no language model returns no requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from interp.client.requests import Abilities, Reply, Request
from interp.records import Examples, Explanation, Judged
from sae.base.plugins import Plugin, discover


@dataclass(frozen=True)
class Explainer(Plugin):
    """A way of explaining. Subclasses add their constants as fields."""

    needs_llm: ClassVar[bool] = True
    """Whether it asks the explainer model."""

    @property
    def refines(self) -> bool:
        """Returns whether it wants to be shown what its explanation got wrong (`refined`)."""
        return False

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""

    def requests(self, examples: Examples, abilities: Abilities) -> list[Request]:
        """Returns what is asked: one request for every candidate."""
        return []

    def explanations(self, examples: Examples, replies: Sequence[Reply]) -> list[Explanation]:
        """Returns the candidates; fewer than there are replies where some failed, none where it has nothing to say."""
        raise NotImplementedError

    def refined(
        self, examples: Examples, explanation: Explanation, judged: Sequence[Judged], abilities: Abilities
    ) -> list[Request]:
        """Returns the question for a better explanation, given what a judge made of this one on the valid split."""
        return []


discover(__name__, __path__)
