"""Scorers: how well an explanation says where its latent fires. One file each.

    examples -> tasks -> requests -> replies -> judgements -> score

`prepare` alone may run the model that the coder reads; what it returns is stored. All the rest are pure functions, so
that live, cached and batched answers give the same score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from interp.client.requests import Abilities, Reply, Request
from interp.records import Examples, Explanation, Facts, Item, Judgement, Score, Task
from interp.scoring.misses import ranked_misses
from sae.base.plugins import Plugin, discover

if TYPE_CHECKING:
    from interp.evidence.subject import Subject


@dataclass(frozen=True)
class Trial:
    """What a model is to judge: an explanation, held against tasks."""

    explanation: Explanation
    tasks: Sequence[Task]
    abilities: Abilities
    """What the model can be asked."""


@dataclass(frozen=True)
class Scorer(Plugin):
    """A way of scoring. Subclasses add their constants as fields."""

    role: ClassVar[str] = "judge"
    """Who is asked: one of `interp.client.requests.ROLES`."""
    headline: ClassVar[str] = "balanced_accuracy"
    """The measure by which explanations are compared, and whose null and lift are told."""
    needs_explanation: ClassVar[bool] = True
    """Whether the score is one of an explanation; else it is one of the latent, and what guessing gives, its measure
    `chance`, stands for the shuffled null."""
    takes_rules: ClassVar[bool] = False
    """Whether the rule of an explanation that has one decides, so that nobody need be asked."""
    tunes: ClassVar[bool] = False
    """Whether judgements have no natural threshold, so that one is tuned on the valid split, which is judged too."""
    chooses: ClassVar[bool] = False
    """Whether explainers may choose between candidates by what it makes of the valid split: a judge's probabilities."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""

    def prepare(self, examples: Examples, subject: "Subject") -> dict[str, Any]:
        """Returns what must be computed with the subject model, as JSON values; most scorers need nothing."""
        return {}

    def tasks(self, examples: Examples, split: str, prepared: dict[str, Any]) -> list[Task]:
        """Returns what is judged, in an order that tells nothing; none where the examples do not suffice."""
        raise NotImplementedError

    def marks(self, item: Item) -> tuple[int, ...]:
        """Returns the tokens of an item that are marked, and that alone a rule looks at; here none: a rule sees all."""
        return ()

    def requests(self, trial: Trial) -> list[Request]:
        """Returns what is asked; nothing where the explanation's rule decides."""
        raise NotImplementedError

    def judgements(self, trial: Trial, replies: Sequence[Reply]) -> list[Judgement]:
        """Returns the judgement on every task, given the replies to `requests` of the same trial."""
        raise NotImplementedError

    def score(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], facts: Facts, threshold: float | None = None
    ) -> Score:
        """Returns the score; `threshold` is the tuned one of a scorer that `tunes`."""
        raise NotImplementedError

    def misses(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], threshold: float | None = None
    ) -> list[float | None]:
        """Returns by task how wrong its answer is: from 0 (right) to 1, above a half where it is wrong, and None where
        there is none. By default that is told by its rank among the answers on tasks of the other truth.
        """
        return ranked_misses(tasks, judgements, threshold)


discover(__name__, __path__)
