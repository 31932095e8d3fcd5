"""The shared types: a window of text, what is asked about it, an explanation, and a judgement.

    evidence -> Examples -> Explanation -> requests -> replies -> Judgement -> score

Everything here is plain data that survives a round trip through JSON.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

SPLITS = ("explain", "valid", "test")
TIERS = ("random", "same_token", "neighbor")
ACTIVE = "active"


@dataclass(frozen=True)
class Window:
    """A piece of text as it is shown, with one latent's activations on it."""

    section: int
    """The section of a document that it lies in: windows of one section are not independent."""
    start: int
    """Position of its first token in the corpus: row times row length plus place in the row."""
    tokens: tuple[int, ...]
    text: str
    """All tokens decoded at once."""
    bounds: tuple[int, ...]
    """Token i is text[bounds[i] : bounds[i + 1]], which is empty where it is a part of a character only."""
    activations: tuple[float, ...]
    """The latent's value at every token."""
    peak: int
    """The token about which the window is placed; of an active window, where the latent is largest among the tokens of
    its cell (`interp.evidence.tally`). One that the window has beside the cell may be larger."""

    @property
    def strength(self) -> float:
        """Returns the largest activation by magnitude."""
        return max(map(abs, self.activations), default=0.0)

    def pieces(self) -> list[str]:
        """Returns the text of every token."""
        return [self.text[a:b] for a, b in zip(self.bounds, self.bounds[1:], strict=False)]


@dataclass(frozen=True)
class Item:
    """A window to be judged: does the explanation hold there?"""

    window: Window
    tier: str
    """ACTIVE, or why a silent window was chosen: one of TIERS."""
    decile: int = -1
    """Of an active window: 0 (weakest) to 9 among those of its latent."""
    marks: tuple[int, ...] = ()
    """The tokens marked in fuzzing: where an active window fires; of a silent one, the pattern of an active one."""

    @property
    def active(self) -> bool:
        """Returns whether the latent fires in the window."""
        return self.tier == ACTIVE


@dataclass(frozen=True)
class Excerpt:
    """A window that people are shown of a latent."""

    window: Window
    decile: int = -1
    """Where its largest value is among those of the uniform sample: 0 (weakest) to 9; -1 where that is not known."""
    split: str = ""
    """The part of the text that it is from: one of SPLITS; "" where that is not known."""


class Together(NamedTuple):
    """A latent that fires where another one does."""

    latent: int
    share: float
    """Of the places of the other one, those at which this one fires too."""
    lift: float
    """How much more often that is than among all tokens."""
    places: int
    """How many places were looked at."""


@dataclass(frozen=True)
class Facts:
    """What is known of a latent beside its windows."""

    fired: int
    """Tokens on which it fires."""
    tokens: int
    """Tokens that were looked at."""
    rates: dict[str, float]
    """By split, the share of windows in which it fires: the true rate to which precision is re-weighted."""
    largest: float
    """Its largest activation by magnitude."""
    histogram: tuple[int, ...]
    """Tokens by activation, in half octaves (`interp.evidence.tally.bin_edges`)."""
    positions: tuple[int, ...]
    """Tokens by place in the row, in sixteenths."""
    top_tokens: tuple[tuple[str, float], ...] = ()
    """The top of its token histogram: the tokens of the peaks in the uniform sample of the explain split, with their
    shares of the activation."""
    promoted: tuple[str, ...] = ()
    """The tokens whose logits its direction raises most; empty where it does not reach the residual stream linearly."""
    suppressed: tuple[str, ...] = ()
    neighbors: tuple[tuple[int, float], ...] = ()
    """The latents whose decoders point the same way, with cosines."""
    together: tuple[Together, ...] | None = None
    """The latents that fire together with it, those that say most of it first; None where nobody counted them."""

    @property
    def rate(self) -> float:
        """Returns the share of tokens on which it fires."""
        return self.fired / max(1, self.tokens)


@dataclass(frozen=True)
class Examples:
    """All that is shown of one latent. No section of text lies in more than one of explain, valid and test."""

    latent: int
    facts: Facts
    explain: tuple[Item, ...] = ()
    """Active windows for the explainer, strongest first, then silent ones to set against them."""
    valid: tuple[Item, ...] = ()
    """For choosing between explanations and tuning thresholds."""
    test: tuple[Item, ...] = ()
    """For the score alone."""
    missing: str = ""
    """Why the latent cannot be scored ("insufficient: 4 windows of 3 documents in test"); empty where it can."""

    def of(self, split: str) -> tuple[Item, ...]:
        """Returns the items of a split."""
        return getattr(self, split)


@dataclass(frozen=True)
class Explanation:
    """What a latent is said to mean."""

    latent: int
    text: str
    method: str
    """The explainer's name, or where the text comes from."""
    by: str = ""
    """The language model that wrote it."""
    rule: dict[str, Any] | None = None
    """Of an explainer that writes rules: what decides without any judge (`interp.explainers.token_lookup`)."""
    detail: dict[str, Any] = field(default_factory=dict)
    """How it was chosen: rounds, validation scores."""

    def with_(self, **changes: Any) -> "Explanation":
        """Returns a copy with some fields replaced."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Explanation":
        """Returns what `to_json` wrote."""
        return Explanation(**data)


@dataclass(frozen=True)
class Judgement:
    """The answer on one item. A failed call is no answer: `value` is None, and `reason` says why."""

    value: float | None
    """Larger where the explanation is said to hold; a probability in detection and fuzzing."""
    reason: str = ""
    levels: tuple[float, ...] = ()
    """Of simulation: what is predicted for every token of the window."""

    @property
    def valid(self) -> bool:
        """Returns whether there is an answer."""
        return self.value is not None


@dataclass(frozen=True)
class Task:
    """One thing to be judged, with the truth: what a scorer makes of items."""

    items: tuple[Item, ...]
    """One window; of the intruder scorer several, of intervention none."""
    truth: float
    """What the judgement is held against: 1 where the latent fires and 0 where not; the intruder's place."""
    tier: str = ACTIVE
    decile: int = -1
    section: int = -1
    """What bootstraps draw: tasks of one section go together."""
    text: str = ""
    """Of intervention: the passage that the model wrote with the latent amplified."""
    clean: str = ""
    """Of intervention: what it wrote without."""


Judged = tuple[Task, Judgement]
"""A task with the answer on it."""


@dataclass(frozen=True)
class Seen:
    """A task with the answer on it, as people look at it."""

    windows: tuple[Window, ...]
    """What was judged: one window; of the intruder scorer several, of intervention none. They have no token ids."""
    truth: float
    tier: str
    decile: int
    value: float | None
    """The answer, as in `Judgement`. None where there is none, and `reason` says why."""
    reason: str = ""
    miss: float | None = None
    """From 0 (right) to 1 (as wrong as can be), by the scorer; above a half is wrong. None where there is no answer."""
    marks: tuple[int, ...] = ()
    """Of fuzzing: the tokens that were marked."""
    levels: tuple[float, ...] = ()
    """Of simulation: what was predicted for every token, 0 to 9."""
    text: str = ""
    """Of intervention: what the model wrote with the latent amplified,"""
    clean: str = ""
    """and without."""


@dataclass(frozen=True)
class Measure:
    """A figure with its 95 % interval.

    `value` is None where it cannot be had from these tasks (n/a), `low` and `high` also where all are of one section.
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """Returns it as people read it."""
        if self.value is None:
            return "n/a"
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Score:
    """What judgements amount to. A missing answer is in no figure; it lowers `coverage`, and its reason is counted."""

    measures: dict[str, Measure]
    """By name; the scorer's `headline` is among them."""
    n: int
    """Tasks with an answer."""
    coverage: float
    """Share of the tasks that were asked which have one."""
    invalid: dict[str, int]
    """Missing answers by reason."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {**vars(self), "measures": {name: dict(vars(found)) for name, found in self.measures.items()}}
