"""Embedding: does the explanation lie near the texts in which the latent fires (arXiv 2410.13928, section 4.4)?

    s(x) = cos(E(instruction + z), E(x))

E is a sentence encoder. The vectors of windows do not depend on the explanation, so they are asked for apart from its
own and computed once. TF-IDF, an encoder that needs no model, is fitted to the texts that it compares: it gets all of
them at once, with the explanation's telling words in place of an instruction. The threshold is tuned on the valid
split.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import ClassVar

from interp.client.requests import Embed, Reply, Request
from interp.prompts.reading import passage_for_encoder, query_for_encoder, query_for_words
from interp.records import Examples, Facts, Judgement, Score, Task
from interp.scorers import Scorer, Trial
from interp.scoring.metrics import classification
from interp.scoring.tasks import window_tasks

BATCH = 64  # windows asked about together

Vector = tuple[float, ...]


@Scorer.register_subclass("embedding")
@dataclass(frozen=True)
class Embedding(Scorer):
    """Asks an encoder how near the windows are."""

    role: ClassVar[str] = "encoder"
    headline: ClassVar[str] = "auroc"
    tunes: ClassVar[bool] = True

    def tasks(self, examples: Examples, split: str, prepared: dict[str, object]) -> list[Task]:
        """Returns one task an item; none without both active and silent ones."""
        return window_tasks(examples.of(split), "embedding", examples.latent, split)

    def requests(self, trial: Trial) -> list[Request]:
        """Returns one request for the explanation and one for every 64 windows; or one for all together."""
        windows = tuple(passage_for_encoder(task.items[0].window) for task in trial.tasks)
        if not windows:
            return []
        if trial.abilities.fits_texts:
            return [Embed(self.role, (query_for_words(trial.explanation.text), *windows))]
        batches = [windows[start : start + BATCH] for start in range(0, len(windows), BATCH)]
        query = (query_for_encoder(trial.explanation.text),)
        return [Embed(self.role, texts) for texts in (query, *batches)]

    def judgements(self, trial: Trial, replies: Sequence[Reply]) -> list[Judgement]:
        """Returns the cosine of every window."""
        if not trial.tasks:
            return []
        first, batches = replies[0], replies[1:]
        if not first.ok:
            return [Judgement(None, first.failure)] * len(trial.tasks)
        near = partial(_cosine, first.vectors[0], _squares(first.vectors[0]))
        if trial.abilities.fits_texts:
            return [near(vector) for vector in first.vectors[1:]]
        sizes = [min(BATCH, len(trial.tasks) - start) for start in range(0, len(trial.tasks), BATCH)]
        found: list[Judgement] = []
        for size, reply in zip(sizes, batches, strict=True):
            missing = [Judgement(None, reply.failure)] * size
            found += [near(vector) for vector in reply.vectors] if reply.ok else missing
        return found

    def score(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], facts: Facts, threshold: float | None = None
    ) -> Score:
        """Returns the score of telling active from silent; what needs a threshold is n/a without one."""
        return classification(tasks, judgements, facts, threshold)


def _cosine(a: Vector, squares: float, b: Vector) -> Judgement:
    """The cosine of two vectors, of the first of which the squares are summed; 0 where one is 0, as without words."""
    norms = math.sqrt(squares * _squares(b))
    value = math.fsum(map(mul, a, b)) / norms if norms else 0.0
    return Judgement(value) if math.isfinite(value) else Judgement(None, "parse")


def _squares(a: Vector) -> float:
    return math.fsum(map(mul, a, a))
