"""Surprisal: is a text more likely after the explanation than after one that says nothing (arXiv 2410.13928, 4.3)?

    v(x) = mean_t log p(x_t | z, x_<t) - mean_t log p(x_t | z0, x_<t)        in nats per token of the reader

z is the explanation and z0 a fixed neutral description, both at the end of the same few-shot prompt. The second term
does not depend on the explanation, so it is computed once for all of them. Per token, for windows of equal length to
the model that is explained differ in length to the reader. The threshold is tuned on the valid split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from interp.client.requests import LogProb, Reply, Request
from interp.prompts.reading import NEUTRAL, described_window
from interp.records import Examples, Facts, Judgement, Score, Task
from interp.scorers import Scorer, Trial
from interp.scoring.judging import likelier
from interp.scoring.metrics import classification
from interp.scoring.tasks import window_tasks


@Scorer.register_subclass("surprisal")
@dataclass(frozen=True)
class Surprisal(Scorer):
    """Asks a reader how likely the windows are."""

    role: ClassVar[str] = "reader"
    headline: ClassVar[str] = "auroc"
    tunes: ClassVar[bool] = True

    def tasks(self, examples: Examples, split: str, prepared: dict[str, object]) -> list[Task]:
        """Returns one task an item; none without both active and silent ones."""
        return window_tasks(examples.of(split), "surprisal", examples.latent, split)

    def requests(self, trial: Trial) -> list[Request]:
        """Returns two requests a window: after the explanation, and after the neutral description."""
        return [
            LogProb(self.role, *described_window(description, task.items[0].window))
            for task in trial.tasks
            for description in (trial.explanation.text, NEUTRAL)
        ]

    def judgements(self, trial: Trial, replies: Sequence[Reply]) -> list[Judgement]:
        """Returns v of every window, in nats per token."""
        return [
            likelier(given, plain, per_token=True) for given, plain in zip(replies[::2], replies[1::2], strict=True)
        ]

    def score(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], facts: Facts, threshold: float | None = None
    ) -> Score:
        """Returns the score of telling active from silent; what needs a threshold is n/a without one."""
        return classification(tasks, judgements, facts, threshold)
