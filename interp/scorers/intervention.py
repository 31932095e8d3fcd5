"""Intervention: does the explanation become likelier after what the model writes with the latent amplified?

    S = mean over prompts x of  log p(z | x, g~) - log p(z | x, g)        in nats, summed over the explanation's tokens

(arXiv 2410.13928, section on intervention scoring.) g is what the model writes after x, g~ the same with the latent's
direction added, by as much as makes the next token's KL a given number of nats (`interp/scoring/steering.py`). The
reader sees a passage, then "contains an amplified amount of: z". Prompts are active windows of the test part, cut
before the first token on which the latent fires: what it is shown is what it causes and not what it answers to.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from interp.client.requests import LogProb, Reply, Request
from interp.prompts.reading import amplified_passage
from interp.records import Examples, Facts, Judgement, Score, Task, Window
from interp.scorers import Scorer, Trial
from interp.scoring.judging import likelier
from interp.scoring.metrics import bootstrapped, score_of
from sae.base.errors import ConfigError
from sae.base.settings import at_least

if TYPE_CHECKING:
    from interp.evidence.subject import Subject

LEAST_TOKENS = 4  # of a prompt: shorter ones say too little to be continued
LEAST_PROMPTS = 5


@Scorer.register_subclass("intervention")
@dataclass(frozen=True)
class Intervention(Scorer):
    """Asks a reader what an amplified latent adds to a text."""

    kl: float = 1.0
    """KL(clean || amplified) of the next token in nats, the mean over the prompts: how far the latent is amplified."""
    prompts: int = 30
    """Prompts that are continued, at most."""
    new_tokens: int = 8
    """Tokens that are written after each."""

    role: ClassVar[str] = "reader"
    headline: ClassVar[str] = "nats"

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        if not self.kl > 0:
            raise ConfigError(f"scorers.intervention.kl: {self.kl} is too small; it must be above 0")
        at_least("scorers.intervention.prompts", self.prompts, LEAST_PROMPTS)
        at_least("scorers.intervention.new_tokens", self.new_tokens, 1)

    def prepare(self, examples: Examples, subject: "Subject") -> dict[str, Any]:
        """Returns `strength`, `kl` and `passages` (section, clean, amplified), or `missing`: why there are none."""
        from interp.scoring.steering import steered

        cut = [(item.window.section, prompt(item.window)) for item in examples.test if item.active]
        chosen = [pair for pair in cut if len(pair[1]) >= LEAST_TOKENS][: self.prompts]
        if len(chosen) < LEAST_PROMPTS:
            return {"missing": f"insufficient: {len(chosen)} prompts"}
        if not subject.lm.is_causal:
            return {"missing": "the model predicts no next token"}
        made = steered(subject, examples.latent, [tokens for _, tokens in chosen], self.kl, self.new_tokens)
        if made is None:
            return {"missing": "the latent writes nothing"}
        found: dict[str, Any] = {"strength": made.matched.strength, "kl": made.matched.kl}
        if not made.matched.reached:
            return found | {
                "missing": f"no strength gives a KL of {self.kl:g} nats; the nearest is {made.matched.kl:.3g}"
            }
        sections = [section for section, _ in chosen]
        columns = zip(sections, made.clean, made.amplified, strict=True)
        return found | {"passages": [{"section": s, "clean": c, "amplified": a} for s, c, a in columns]}

    def tasks(self, examples: Examples, split: str, prepared: dict[str, Any]) -> list[Task]:
        """Returns one task a prompt; none of other parts than test, or where something was missing."""
        passages = prepared.get("passages", []) if split == "test" else []
        return [
            Task((), 1.0, section=passage["section"], text=passage["amplified"], clean=passage["clean"])
            for passage in passages
        ]

    def requests(self, trial: Trial) -> list[Request]:
        """Returns two requests a prompt: the explanation after either passage."""
        return [
            LogProb(self.role, *amplified_passage(passage, trial.explanation.text))
            for task in trial.tasks
            for passage in (task.text, task.clean)
        ]

    def judgements(self, trial: Trial, replies: Sequence[Reply]) -> list[Judgement]:
        """Returns by prompt how much likelier the explanation is after the amplified passage, in nats."""
        return [likelier(more, plain) for more, plain in zip(replies[::2], replies[1::2], strict=True)]

    def score(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], facts: Facts, threshold: float | None = None
    ) -> Score:
        """Returns the mean over prompts, with the interval of a bootstrap over their sections."""
        answered = [(t.section, j.value) for t, j in zip(tasks, judgements, strict=True) if j.value is not None]
        values = [value for _, value in answered]
        mean = bootstrapped(lambda weights: weights @ values / weights.sum(1), [section for section, _ in answered])
        return score_of({"nats": mean}, judgements)

    def misses(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], threshold: float | None = None
    ) -> list[float | None]:
        """Returns 1 / (1 + e^v): above a half where the explanation became less likely."""
        return [None if found.value is None else 1 / (1 + math.exp(min(found.value, 700))) for found in judgements]


def prompt(window: Window) -> tuple[int, ...]:
    """Returns the tokens before the first one, other than the very first, on which the latent fires."""
    fires = (place for place, value in enumerate(window.activations) if place and value)
    return window.tokens[: next(fires, 0)]
