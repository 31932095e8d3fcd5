"""What steering gives: both continuations, by how much the model was changed where, and how strong the edits were."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae.base.visible import visible
from sae.pages.marks import as_html, marked
from sae.steering.strengths import Strength

WHAT_KL = "KL(plain || steered) at each token of the plain greedy continuation"


@dataclass(frozen=True)
class Arm:
    """One continuation."""

    text: str
    """As the model wrote it."""
    ids: tuple[int, ...]
    """With the token by which it ended, if it did."""
    pieces: tuple[str, ...]
    """What each token shows."""
    perplexity: float
    """Under the plain model, after the prompt."""
    end: str
    """"stop" or "length"."""


@dataclass(frozen=True, repr=False)
class Steered:
    """What a model says with latents edited, beside what it says without. Print it, or look at it in a notebook."""

    prompt: str
    """As the model read it, with what stands around it."""
    plain_arm: Arm
    steered_arm: Arm
    kl: tuple[float, ...]
    """In nats, by token of `measured`."""
    measured: tuple[str, ...]
    """The tokens of the plain greedy continuation: at temperature 0 those of the plain arm."""
    strengths: tuple[Strength, ...]
    """The edits, each with the strength that was used."""
    monotone: bool | None
    """Whether the KL rose with the strength wherever it was tried for a target; None without a target."""
    tokens: int
    """Tokens that were read while the steered continuation was written,"""
    masked: int
    """how many of them are left alone, as in training,"""
    changed: int
    """and at how many an edit changed something."""
    model: str
    untemplated: bool
    """Whether the prompt was read as plain text by a model that has a template for chats."""
    temperature: float
    seed: int

    @property
    def plain(self) -> str:
        """Returns what the model says without edits."""
        return self.plain_arm.text

    @property
    def steered(self) -> str:
        """Returns what it says with them."""
        return self.steered_arm.text

    @property
    def mean_kl(self) -> float:
        """Returns the mean KL in nats."""
        return sum(self.kl) / max(1, len(self.kl))

    @property
    def note(self) -> str:
        """Returns what is to be known of the search for a KL and of how the prompt was read, "" if nothing is."""
        told = {
            "the KL does not rise steadily with the strength, so that others may reach it too": self.monotone is False,
            "the prompt was read as plain text, though the model has a template for chats (chat)": self.untemplated,
        }
        return "; ".join(text for text, holds in told.items() if holds)

    @property
    def figures(self) -> list[str]:
        """Returns what was done and what it did, a line each."""
        left = f", {self.masked} masked as in training and left alone" if self.masked else ""
        perplexities = f"{self.plain_arm.perplexity:.4g} plain, {self.steered_arm.perplexity:.4g} steered"
        rows = {
            "edits": ", ".join(map(str, self.strengths)) or "none",
            "changed": f"{self.changed} of {self.tokens} tokens{left}",
            "KL": f"{self.mean_kl:.4g} nats, the mean over {len(self.kl)} tokens of the plain greedy continuation",
            "note": self.note,
            "perplexity": f"{perplexities} (under the plain model)",
        }
        return [f"{name:12} {told}" for name, told in rows.items() if told]

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as plain JSON values; `tokens` and `pieces` as they can be shown, texts as written."""
        arms = {"plain": self.plain_arm, "steered": self.steered_arm}
        perplexities = {name: arm.perplexity for name, arm in arms.items()}
        return {
            "model": self.model,
            "prompt": self.prompt,
            **{name: arm.text for name, arm in arms.items()},
            "kl": list(self.kl),
            "tokens": list(self.measured),
            "mean_kl": self.mean_kl,
            "perplexity": {name: value if math.isfinite(value) else None for name, value in perplexities.items()},
            "edits": [str(one) for one in self.strengths],
            "note": self.note,
            "strengths": [
                one.asked.to_json() | {"value": one.value, "largest": one.largest, "largest_from": one.source}
                for one in self.strengths
            ],
            "read": {"tokens": self.tokens, "masked": self.masked, "changed": self.changed},
            "pieces": {name: list(arm.pieces) for name, arm in arms.items()},
            "ids": {name: list(arm.ids) for name, arm in arms.items()},
            "end": {name: arm.end for name, arm in arms.items()},
            "temperature": self.temperature,
            "seed": self.seed,
        }

    def __str__(self) -> str:
        arms = (("plain", self.plain), ("steered", self.steered))
        return "\n".join([*(f"{name:12} {in_lines(text)}" for name, text in arms), *self.figures])

    def __repr__(self) -> str:
        return f"Steered({visible(self.plain)!r} -> {visible(self.steered)!r}, KL {self.mean_kl:.3g})"

    def _repr_html_(self) -> str:
        greedy = list(self.plain_arm.pieces) == list(self.measured)
        shaded = _shaded(self.measured, self.kl)
        cells = [
            ("plain", shaded if greedy else _shaded(self.plain_arm.pieces, ())),
            ("steered", _shaded(self.steered_arm.pieces, ())),
        ]
        cells += [] if greedy else [("plain, greedy", shaded)]
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name, _ in cells)
        row = "".join(
            f"<td style='text-align:left;vertical-align:top;width:{98 // len(cells)}%'>{cell}</td>" for _, cell in cells
        )
        lines = "<br>".join(as_html(line.strip()) for line in [f"prompt       {self.prompt}", *self.figures])
        return f"<p>{lines}</p><table style='width:100%'><tr>{head}</tr><tr>{row}</tr></table><p>shaded: {WHAT_KL}</p>"


def in_lines(text: str) -> str:
    """Returns text for a terminal: its own lines, and in them what cannot be seen as codes."""
    return "\n".join(map(visible, text.split("\n")))


def _shaded(pieces: Sequence[str], values: Sequence[float]) -> str:
    return marked(list(pieces), list(values) or [0.0] * len(pieces), max(values, default=0.0))
