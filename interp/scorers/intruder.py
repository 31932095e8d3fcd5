"""Intruder: can a judge tell which of k texts a latent does not fire in (arXiv 2507.08473)?

It needs no explanation: it is a score of the latent. One whose texts have nothing in common scores 1/k, and no
explanation of it can be any good; one that scores high beside a poor explanation deserves a better one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from interp.client.requests import Chat, Reply, Request
from interp.prompts.judging import Messages, odd_one
from interp.prompts.windows import shown
from interp.records import TIERS, Examples, Facts, Judgement, Measure, Score, Task
from interp.scorers import Scorer, Trial
from interp.scoring.judging import CHOSEN, choice, chosen_id
from interp.scoring.metrics import hit_rate, score_of
from sae.base.errors import ConfigError
from sae.base.seeding import generator
from sae.base.settings import at_least

TOKENS_OF_ANSWER = 32


@Scorer.register_subclass("intruder")
@dataclass(frozen=True)
class Intruder(Scorer):
    """Asks which text does not belong."""

    windows: int = 5
    """Texts in a question, one of them the intruder: k."""
    questions: int = 20
    """Questions a latent, as far as there are silent windows; active ones serve again when all have served."""

    headline: ClassVar[str] = "accuracy"
    needs_explanation: ClassVar[bool] = False

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        if not 3 <= self.windows <= 9:
            raise ConfigError(f"scorers.intruder.windows: {self.windows} is not between 3 and 9")
        at_least("scorers.intruder.questions", self.questions, 1)

    def tasks(self, examples: Examples, split: str, prepared: dict[str, object]) -> list[Task]:
        """Returns the questions, all windows of each from different sections; none where these do not suffice."""
        source = generator(0, "intruder", examples.latent, split)
        items = examples.of(split)
        active = [item for item in items if item.active]
        silent = [item for item in items if item.tier == TIERS[0]]
        silent = [silent[place] for place in torch.randperm(len(silent), generator=source).tolist()]
        used = [0] * len(active)
        tasks: list[Task] = []
        for intruder in silent[: self.questions]:
            group, order = {intruder.window.section: -1}, torch.randperm(len(active), generator=source).tolist()
            for place in sorted(order, key=lambda place: used[place]):
                if len(group) < self.windows:
                    group.setdefault(active[place].window.section, place)
            if len(group) < self.windows:
                continue
            chosen = list(group.values())[1:]
            for place in chosen:
                used[place] += 1
            at = int(torch.randint(self.windows, (1,), generator=source))
            windows = [active[place] for place in chosen]
            windows.insert(at, intruder)
            tasks.append(Task(tuple(windows), float(at), section=intruder.window.section))
        return tasks

    def requests(self, trial: Trial) -> list[Request]:
        """Returns one request a question."""
        asked = [_asked(task, trial.abilities.choices) for task in trial.tasks]
        if trial.abilities.choices:
            return [Chat(self.role, messages, max_tokens=1, choices=labels) for messages, labels in asked]
        return [Chat(self.role, messages, TOKENS_OF_ANSWER, schema=CHOSEN) for messages, _ in asked]

    def judgements(self, trial: Trial, replies: Sequence[Reply]) -> list[Judgement]:
        """Returns the place of the text that is said not to belong, for every question."""
        read = choice if trial.abilities.choices else chosen_id
        answered = zip(trial.tasks, replies, strict=True)
        return [read(reply, _asked(task, trial.abilities.choices)[1]) for task, reply in answered]

    def score(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], facts: Facts, threshold: float | None = None
    ) -> Score:
        """Returns the share of intruders found, and what guessing finds."""
        answered = [(task, found.value) for task, found in zip(tasks, judgements, strict=True) if found.valid]
        accuracy = hit_rate([value == task.truth for task, value in answered], [task.section for task, _ in answered])
        chance = 1 / self.windows
        return score_of({"accuracy": accuracy, "chance": Measure(chance, chance, chance)}, judgements)

    def misses(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], threshold: float | None = None
    ) -> list[float | None]:
        """Returns 1 where another text was chosen than the intruder."""
        pairs = zip(tasks, judgements, strict=True)
        return [float(found.value != task.truth) if found.valid else None for task, found in pairs]


def _asked(task: Task, numbered: bool) -> tuple[Messages, tuple[str, ...]]:
    return odd_one([shown(item.window) for item in task.items], numbered)
