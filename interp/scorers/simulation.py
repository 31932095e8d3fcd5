"""Simulation: do the activations that follow from the explanation correlate with the true ones?

    level of token t = sum_k k p_t(k) / sum_k p_t(k)        k = 0 ... 9

(Bills 2023, "Language models can explain neurons in language models"; all tokens at once, as in arXiv 2410.13928,
section 4.5.) p_t is what the judge expects where the level of token t would stand, in a list of all tokens that shows
no level. It knows that levels may be lost, so p_t is largely spent on "level not shown": of what is left, the levels
must hold half. A judge that does not show such probabilities is asked for the levels above 0, by token number.

The score is Pearson's correlation over the tokens of active and random windows together. Signed latents count by
magnitude.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from interp.client.requests import Abilities, Chat, LogProb, Reply, Request
from interp.prompts.reading import LEVELS, LEVELS_SCHEMA, UNKNOWN, simulated_levels, simulation_messages
from interp.records import ACTIVE, Examples, Facts, Judgement, Measure, Score, Task, Window
from interp.scorers import Scorer, Trial
from interp.scoring.judging import LEAST_MASS
from interp.scoring.metrics import NONE, correlation, score_of
from interp.scoring.tasks import window_tasks
from sae.base.settings import choose

TOKENS_PER_LEVEL = 16  # of an answer in JSON
SHOWN_TIERS = (ACTIVE, "random")


@Scorer.register_subclass("simulation")
@dataclass(frozen=True)
class Simulation(Scorer):
    """Asks for the activations."""

    asks: str = "judge"
    """Who simulates: judge, or reader (by default the model that the coder reads: it costs nothing, and knows less)."""

    headline: ClassVar[str] = "correlation"

    def __post_init__(self) -> None:
        object.__setattr__(self, "role", self.asks)

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        choose("scorers.simulation.asks", self.asks, ("judge", "reader"))

    def tasks(self, examples: Examples, split: str, prepared: dict[str, object]) -> list[Task]:
        """Returns one task for every active and every random window; none without both."""
        items = [item for item in examples.of(split) if item.tier in SHOWN_TIERS]
        return window_tasks(items, "simulation", examples.latent, split)

    def requests(self, trial: Trial) -> list[Request]:
        """Returns one request a window, of the kind that the judge can answer."""
        windows = [task.items[0].window for task in trial.tasks]
        if _reads(trial.abilities):
            framed = [simulated_levels(trial.explanation.text, window) for window in windows]
            return [LogProb(self.role, *frame, choices=(*LEVELS, UNKNOWN)) for frame in framed]
        return [
            Chat(
                self.role,
                simulation_messages(trial.explanation.text, window),
                max_tokens=TOKENS_PER_LEVEL * (len(window.tokens) + 2),
                schema=LEVELS_SCHEMA,
            )
            for window in windows
        ]

    def judgements(self, trial: Trial, replies: Sequence[Reply]) -> list[Judgement]:
        """Returns the predicted levels of every window; the value is the largest of them, as a share of the most."""
        read = _expected if _reads(trial.abilities) else _listed
        return [read(task.items[0].window, reply) for task, reply in zip(trial.tasks, replies, strict=True)]

    def score(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], facts: Facts, threshold: float | None = None
    ) -> Score:
        """Returns the correlation over all windows, n/a without answers on both kinds, and that over active ones."""
        pairs = [pair for pair in zip(tasks, judgements, strict=True) if pair[1].valid]
        active = [pair for pair in pairs if pair[0].truth > 0]
        both = 0 < len(active) < len(pairs)
        measures = {"correlation": _correlation(pairs) if both else NONE, "correlation[active]": _correlation(active)}
        return score_of(measures, judgements)

    def misses(
        self, tasks: Sequence[Task], judgements: Sequence[Judgement], threshold: float | None = None
    ) -> list[float | None]:
        """Returns d / (d + 2) of d = mean_t (x_t - y_t)^2 over a window's tokens, both levels and activations in units
        of their spread over all windows: over all tokens d is 2 - 2 r, so a half is what has nothing to do with it.
        """
        pairs = [pair for pair in zip(tasks, judgements, strict=True) if pair[1].valid]
        actual = _standard([[abs(value) for value in task.items[0].window.activations] for task, _ in pairs])
        levels = _standard([judgement.levels for _, judgement in pairs])
        apart = (float(np.square(x - y).mean()) for x, y in zip(levels, actual, strict=True))
        misses = (d / (d + 2) for d in apart)
        return [next(misses) if judgement.valid else None for judgement in judgements]


def _standard(windows: Sequence[Sequence[float]]) -> list[Float[ndarray, "_tokens"]]:
    """Returns numbers less their mean over all windows, by their spread if they have one."""
    every = np.array([value for window in windows for value in window])
    mean, spread = (float(every.mean()), float(every.std())) if len(every) else (0.0, 0.0)
    return [(np.array(window) - mean) / (spread or 1.0) for window in windows]


def _reads(abilities: Abilities) -> bool:
    """Returns whether alternatives to the tokens of a prompt come back, enough for all levels."""
    return abilities.prompt_logprobs and abilities.prompt_top > len(LEVELS)


def _correlation(pairs: Sequence[tuple[Task, Judgement]]) -> Measure:
    actual = [[abs(value) for value in task.items[0].window.activations] for task, _ in pairs]
    return correlation([judgement.levels for _, judgement in pairs], actual, [task.section for task, _ in pairs])


def _expected(window: Window, reply: Reply) -> Judgement:
    """The expected levels, from the probabilities of the levels and of "not shown" at every token."""
    if not reply.ok:
        return Judgement(None, reply.failure)
    levels, shares = [], []
    for row in reply.logprobs:
        *known, unknown = (math.exp(min(0.0, value)) for value in row)
        mass = math.fsum(known)
        if not mass > 0:
            return Judgement(None, "no_mass")
        levels.append(math.fsum(level * p for level, p in enumerate(known)) / mass)
        shares.append(mass / max(mass, 1 - unknown))
    if len(levels) != len(window.tokens) or math.fsum(shares) < LEAST_MASS * len(shares):
        return Judgement(None, "no_mass")
    return _judgement(levels)


def _listed(window: Window, reply: Reply) -> Judgement:
    """The levels that an answer gives by token number; any entry that cannot be one makes it none ("parse")."""
    if not reply.ok:
        return Judgement(None, reply.failure)
    entries = reply.data.get("levels") if isinstance(reply.data, dict) else None
    if not isinstance(entries, list):
        return Judgement(None, "parse")
    levels: dict[int, float] = {}
    for entry in entries:
        token, level = (_whole(entry, name) for name in ("token", "level"))
        if token is None or level is None or token in levels:
            return Judgement(None, "parse")
        if not (0 <= token < len(window.tokens) and 0 <= level < len(LEVELS)):
            return Judgement(None, "parse")
        levels[token] = float(level)
    return _judgement([levels.get(token, 0.0) for token in range(len(window.tokens))])


def _whole(entry: Any, name: str) -> int | None:
    value = entry.get(name) if isinstance(entry, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _judgement(levels: list[float]) -> Judgement:
    return Judgement(max(levels, default=0.0) / (len(LEVELS) - 1), levels=tuple(levels))
