"""A latent as the folder of its run tells of it: labels, scores, firing statistics and windows."""

from dataclasses import dataclass, field

from interp.records import Excerpt, Facts, Measure, Seen
from interp.run.kept import asked_of, seen_of
from interp.run.reasons import UNASKED, why
from interp.run.tables import Told
from sae.base.visible import visible
from sae.pages.notebook import table, text_lines


@dataclass(frozen=True, repr=False)
class LatentScore:
    """How well a label does by one scorer, or a latent by one that needs no label. Its text is one line."""

    scorer: str
    """With its judge: "detection[rule]"."""
    headline: str
    """What `measure` is: "balanced_accuracy"."""
    measure: Measure
    """The score: `value`, and `low` and `high` of its 95 % interval; None where there is none."""
    null: Measure
    """The mean score of other latents' labels."""
    lift: Measure
    """Score above null."""
    n: int | None
    """Answers."""
    status: str
    reason: str
    """Why there is no score, or which answers are missing."""
    coverage: float | None = None
    """Share of the tasks that have an answer."""
    measures: dict[str, Measure] = field(default_factory=dict)
    """All figures by name, as in measures.parquet."""
    windows: tuple[Seen, ...] = ()
    """Some of what was judged: the worst misses first, with answers that are missing, then some that are right."""
    asked: tuple[tuple[str, str], ...] = ()
    """One of the questions as it went out, (role, text) by message; empty where nobody was asked."""

    @property
    def value(self) -> float | None:
        """Returns the score, None if there is none."""
        return self.measure.value

    def __repr__(self) -> str:
        if self.value is None:
            return f"{visible(self.scorer)}: no score, {visible(why(self.status, self.reason))}"
        partly = f", {visible(self.reason)} missing" if self.reason else ""
        figures = f"{self.measure}, null {self.null}, lift {self.lift}"
        return f"{visible(self.scorer)}: {self.headline.replace('_', ' ')} {figures}, n {self.n}{partly}"


@dataclass(frozen=True)
class Spread:
    """The scores of all latents by one explainer and scorer, behind their means."""

    own: tuple[float, ...]
    """Of every latent by its own label, in their order."""
    null: tuple[float, ...]
    """By the label of another one; of a scorer that needs no label, what guessing gives."""


def score_of(told: Told) -> LatentScore:
    """Returns the score that a row of the table tells of."""
    row = told.row
    names = {"measure": "score", "null": "null", "lift": "lift"}
    figures = {name: Measure(row[of], row.get(f"{of}_low"), row.get(f"{of}_high")) for name, of in names.items()}
    ended = {"n": row["n"], "coverage": row["coverage"], "status": row["status"], "reason": row["reason"] or ""}
    kept = {"windows": seen_of(told.source), "asked": asked_of(told.source)}
    return LatentScore(row["scorer"], row["headline"], measures=told.measures, **figures, **ended, **kept)


@dataclass(frozen=True, repr=False)
class Label:
    """What one explainer says of a latent, and how well that does. Its text is one line."""

    explainer: str
    by: str
    """The language model that wrote it, if one did."""
    text: str | None
    status: str
    reason: str
    """Why there is no text."""
    scores: tuple[LatentScore, ...]
    asked: tuple[tuple[str, str], ...] = ()
    """The question as it went out, (role, text) by message; empty where no model was asked."""

    def __repr__(self) -> str:
        by = f" ({visible(self.by)})" if self.by else ""
        told = why(self.status, self.reason) if self.text is None else self.text
        return f"{visible(self.explainer)}{by}: {visible(told)}"

    def _repr_html_(self) -> str:
        rows = [
            (one.scorer, one.headline.replace("_", " "), *map(str, (one.measure, one.null, one.lift, one.n)))
            if one.value is not None
            else (one.scorer, "no score", why(one.status, one.reason), "", "", "")
            for one in self.scores
        ]
        return text_lines([repr(self)]) + (table(("scorer", "", "score", "null", "lift", "n"), rows) if rows else "")


@dataclass(frozen=True)
class LatentRecord:
    """All that a folder tells of one latent."""

    latent: int
    d_sae: int | None
    """Latents of the coder, where the folder says it."""
    asked: bool
    """Whether a command was about it."""
    fired: int | None = None
    """Tokens on which it fires; None where the folder holds no evidence."""
    tokens: int | None = None
    """Tokens that were looked at."""
    facts: Facts | None = None
    """None where no examples are kept of it: it was not asked for, or by an older version."""
    missing: str = ""
    """Why it has too few examples to be scored, if so."""
    strongest: tuple[Excerpt, ...] = ()
    """Where it fires most strongly, of all the text."""
    sampled: tuple[Excerpt, ...] = ()
    """Some of each decile of the uniform sample, the strongest first."""
    labels: tuple[Label, ...] = ()
    scores: tuple[LatentScore, ...] = ()
    """Of scorers that need no label."""
    edited: str | None = None
    """The label that a person gave it, which is shown first; scores are of the others."""

    @property
    def text(self) -> str | None:
        """Returns what it is called: the edited label, else the text of the best one; None if there is neither."""
        return self.edited if self.edited is not None or not self.label else self.label.text

    @property
    def told(self) -> str:
        """Returns in one line what is said of it: the edited label, and the best one or why there is none."""
        edited = [f"edited: {visible(self.edited)}"] if self.edited is not None else []
        return " | ".join([*edited, repr(self.label) if self.label else UNASKED])

    @property
    def dead(self) -> bool:
        """Returns whether it fires nowhere in the text."""
        return self.fired == 0

    @property
    def label(self) -> Label | None:
        """Returns the label with the highest score by the first scorer that scored one, or the first with a text; the
        first without a text says why there is none. None if nothing was asked of it.
        """
        texts = [label for label in self.labels if label.text is not None]
        scored = {score.scorer for label in texts for score in label.scores if score.value is not None}
        first = min(scored, default="")
        values = {id(label): score.value for label in texts for score in label.scores if score.scorer == first}
        best = [label for label in texts if values.get(id(label)) is not None]
        return max(best, key=lambda label: values[id(label)] or 0.0, default=next(iter(texts or self.labels), None))

    @property
    def status(self) -> str:
        """Returns how the work on its label ended: "ok", "failed", "dead" ...; "unasked" if nothing was asked of it."""
        return self.label.status if self.label else "unasked"
