"""Detection: does the judge tell texts in which a latent fires from others (arXiv 2410.13928, section 4.1)?

A judge that shows the probabilities of its first token sees one window a request and answers with one word; its value
is P(yes) / (P(yes) + P(no)). Any other judge sees several windows in one request and gives each a probability, by id.
The order is random, and so is the share of active windows in every request, or a request would tell it.

An explanation with a rule (`interp.explainers.token_lookup`) is decided by it, and nobody is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from interp.client.requests import Abilities, Chat, Reply, Request
from interp.explainers.token_lookup import rule_score
from interp.prompts.judging import DETECTION, Messages, one_text, several_texts
from interp.prompts.windows import shown
from interp.records import Examples, Facts, Item, Judgement, Score, Task
from interp.scorers import Scorer, Trial
from interp.scoring.judging import ANSWERS, NO, YES, by_id, yes_or_no
from interp.scoring.metrics import classification
from interp.scoring.misses import ranked_misses
from interp.scoring.tasks import window_task
from sae.base.seeding import generator
from sae.base.settings import at_least, choose

EVEN = 0.5  # a probability of which or more says active
TOKENS_OF_ANSWER = 48  # of a judge's answer on one window of several, with its id


@Scorer.register_subclass("detection")
@dataclass(frozen=True)
class Detection(Scorer):
    """Asks whether a description fits a text."""

    layout: str = "auto"
    """window (one a request), batch (several a request), or auto: window where the judge shows probabilities."""
    windows_per_request: int = 8
    """Of the layout batch."""

    takes_rules: ClassVar[bool] = True
    chooses: ClassVar[bool] = True
    question: ClassVar[str] = DETECTION

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        name = Scorer.get_choice_name(type(self))
        choose(f"scorers.{name}.layout", self.layout, ("auto", "window", "batch"))
        at_least(f"scorers.{name}.windows_per_request", self.windows_per_request, 1)

    def usable(self, item: Item) -> bool:
        """Returns whether this can be asked of an item."""
        return True

    def tasks(self, examples: Examples, split: str, prepared: dict[str, object]) -> list[Task]:
        """Returns one task an item; none without both active and silent ones."""
        source = generator(0, Scorer.get_choice_name(type(self)), examples.latent, split)
        items = [item for item in examples.of(split) if self.usable(item)]
        items = [items[place] for place in torch.randperm(len(items), generator=source).tolist()]
        active, silent = ([item for item in items if item.active == kind] for kind in (True, False))
        if not active or not silent:
            return []
        return [window_task(item) for item in _mixed(active, silent, self.windows_per_request, source)]

    def requests(self, trial: Trial) -> list[Request]:
        """Returns one request a window or a batch; nothing where the explanation's rule decides."""
        if trial.explanation.rule is not None:
            return []
        if self._alone(trial.abilities):
            texts = [self._text(task) for task in trial.tasks]
            asked = [one_text(self.question, trial.explanation.text, text) for text in texts]
            return [Chat(self.role, messages, max_tokens=1, choices=(YES, NO)) for messages in asked]
        return [
            Chat(self.role, self._asked(trial, batch)[0], TOKENS_OF_ANSWER * (len(batch) + 1), schema=ANSWERS)
            for batch in self._batches(trial.tasks)
        ]

    def judgements(self, trial: Trial, replies: Sequence[Reply]) -> list[Judgement]:
        """Returns the probability on every task that the description fits, or the rule's verdict."""
        if trial.explanation.rule is not None:
            items = [task.items[0] for task in trial.tasks]
            return [Judgement(rule_score(trial.explanation.rule, item.window, self.marks(item))) for item in items]
        if self._alone(trial.abilities):
            return [yes_or_no(reply) for _, reply in zip(trial.tasks, replies, strict=True)]
        answered = zip(self._batches(trial.tasks), replies, strict=True)
        return [found for batch, reply in answered for found in by_id(reply, self._asked(trial, batch)[1])]

    def score(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], facts: Facts, threshold: float | None = None
    ) -> Score:
        """Returns the score of telling active from silent; a probability of a half or more says active."""
        return classification(tasks, judgements, facts, EVEN if threshold is None else threshold)

    def misses(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], threshold: float | None = None
    ) -> list[float | None]:
        """Returns how wrong each answer is, by its side of an even chance, then by its rank."""
        return ranked_misses(tasks, judgements, EVEN if threshold is None else threshold)

    def _alone(self, abilities: Abilities) -> bool:
        """Returns whether every window has a request of its own that one word answers."""
        return abilities.choices and self.layout != "batch"

    def _batches(self, tasks: Sequence[Task]) -> list[Sequence[Task]]:
        size = 1 if self.layout == "window" else self.windows_per_request
        return [tasks[start : start + size] for start in range(0, len(tasks), size)]

    def _asked(self, trial: Trial, batch: Sequence[Task]) -> tuple[Messages, tuple[str, ...]]:
        return several_texts(self.question, trial.explanation.text, [self._text(task) for task in batch])

    def _text(self, task: Task) -> str:
        return shown(task.items[0].window, self.marks(task.items[0]))


def _mixed(active: list[Item], silent: list[Item], size: int, source: torch.Generator) -> list[Item]:
    """Returns all items in groups of `size`. In each the number of the rarer kind is uniform from 0 to twice its share
    of what is left: so it cannot be told, and neither kind runs out early, however many more there are of the other.
    """
    mixed: list[Item] = []
    kinds = active, silent
    while any(kinds):
        few, many = sorted(kinds, key=len)
        total = len(few) + len(many)
        room = min(size, total)
        most, rest = divmod(2 * room * len(few), total)
        most += int(torch.randint(total, (1,), generator=source)) < rest  # on average, twice its share
        n = int(torch.randint(most + 1, (1,), generator=source))
        n = min(max(n, room - len(many)), len(few))
        group = few[:n] + many[: room - n]
        kinds = few[n:], many[room - n :]
        mixed += [group[place] for place in torch.randperm(room, generator=source).tolist()]
    return mixed
