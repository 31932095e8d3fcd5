"""What a text shows: which latents fire at which of its tokens, and what each adds to the logits of the next token."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae.base.arguments import whole
from sae.base.settings import choose
from sae.pages.marks import shown_with

if TYPE_CHECKING:
    import pandas as pd

Logits = tuple[tuple[str, float], ...]
"""Texts of tokens, each with what is added to its logit."""


@dataclass(frozen=True)
class Firing:
    """A latent at one token of a text."""

    latent: int
    label: str | None
    """What an explained run says of it, if one was given and does."""
    position: int
    value: float
    effect: float | None
    """What it adds there, directly, to the logit of the token that follows (`PromptRecord.follows`), above what it adds
    to the average token; None where that is not known (`PromptRecord.no_effects`)."""


@dataclass(frozen=True)
class PromptLatent:
    """A latent that fires in a text, at tokens that count."""

    latent: int
    label: str | None
    positions: tuple[int, ...]
    """Where it fires, ascending."""
    values: tuple[float, ...]
    """What it is there."""
    effects: tuple[float, ...] | None
    """As `Firing.effect`, there."""
    raised: Logits = ()
    """The tokens whose logits it raises most at `position`, the most first; of the latents that come first only."""
    lowered: Logits = ()

    @property
    def position(self) -> int:
        """Returns the token at which it fires most."""
        return self.positions[self.values.index(self.value)]

    @property
    def value(self) -> float:
        """Returns its largest value, by size."""
        return max(self.values, key=abs)

    @property
    def fires(self) -> int:
        """Returns at how many tokens it fires."""
        return len(self.positions)

    @property
    def effect(self) -> float | None:
        """Returns its largest effect on a token that follows, by size."""
        return max(self.effects, key=abs) if self.effects else None

    def to_json(self) -> dict[str, Any]:
        """Returns all there is of it as plain values."""
        derived = ("value", "position", "fires", "effect")
        return {**vars(self), **{name: getattr(self, name) for name in derived}}


ORDERS: dict[str, Callable[[PromptLatent], float]] = {
    "value": lambda latent: abs(latent.value),
    "fires": lambda latent: latent.fires,
    "effect": lambda latent: abs(latent.effect or 0.0),
}
"""By what latents are sorted: the largest value, the number of tokens, the largest effect on a token that follows."""


@dataclass(frozen=True, repr=False)
class PromptRecord:
    """Which latents of a coder fire in a text, and where."""

    model: str
    site: str
    """What the coder reads."""
    d_sae: int
    tokens: tuple[str, ...]
    """The text of each token, on one line: what cannot be seen is a code; "" of a part of a character, which is told
    with a later token."""
    token_ids: tuple[int, ...]
    mask: tuple[bool, ...]
    """Which tokens count, by the mask of training: at the others no latent is told of."""
    follows: tuple[str | None, ...]
    """What follows each token: the next one, and behind the last what the model holds likeliest (None: unknown)."""
    logits: tuple[float | None, ...]
    """The logit of what follows, above the average one: what effects are parts of (before a softcap)."""
    no_effects: str
    """Why effects are not known; "" where they are."""
    latents: tuple[PromptLatent, ...]
    """All that fire at tokens that count, the largest value first."""
    shown: int = 20
    """How many come first where nothing else is said."""

    def top(self, n: int | None = None, by: str = "value") -> list[PromptLatent]:
        """Returns the n latents (`shown`, if nothing is said) that come first by "value", "fires" or "effect"."""
        choose("by", by, ORDERS)
        return sorted(self.latents, key=ORDERS[by], reverse=True)[: self.shown if n is None else whole("n", n)]

    def at(self, position: int) -> list[Firing]:
        """Returns the latents that fire at a token, the largest value first; of one that does not count, none."""
        n, position = len(self.tokens), whole("position", position, least=-sys.maxsize)
        if not -n <= position < n:
            raise IndexError(f"position: {position} is outside the text's {n} tokens")
        return self._by_position()[position % n]

    def of(self, latent: int) -> list[Firing]:
        """Returns the tokens at which a latent fires, in order; none where it is silent."""
        latent = whole("latent", latent, least=0)
        if latent >= self.d_sae:
            raise ValueError(f"latent: {latent} is none of this coder's {self.d_sae}")
        return next((_firings(one) for one in self.latents if one.latent == latent), [])

    def to_json(self) -> dict[str, Any]:
        """Returns plain values: `latents` are those that come first by any order, with their effects; `at` has by token
        (latent, value, effect) of all that fire there; `labels` what they are called; `shown_with` the token whose text
        shows each token (itself, but for a part of a character).
        """
        first = {one.latent for by in ORDERS for one in self.top(by=by)}
        own = {name: value for name, value in vars(self).items() if name not in ("latents", "shown")}
        return {
            **own,
            "shown_with": shown_with(self.tokens),
            "latents": [one.to_json() for one in self.latents if one.latent in first],
            "at": [[(one.latent, one.value, one.effect) for one in some] for some in self._by_position()],
            "labels": {str(one.latent): one.label for one in self.latents if one.label is not None},
        }

    def to_pandas(self) -> "pd.DataFrame":
        """Returns a row for each token that counts and latent that fires there: position, token, latent, label, value,
        follows, effect.
        """
        import pandas as pd

        names = ("position", "token", "latent", "label", "value", "follows", "effect")
        rows = [
            (one.position, self.tokens[one.position], one.latent, one.label, one.value, self.follows[place], one.effect)
            for place, some in enumerate(self._by_position())
            for one in some
        ]
        return pd.DataFrame(rows, columns=list(names))

    def title(self) -> str:
        """Returns what was read by what, and how much fires, in one line."""
        counted = sum(self.mask)
        fired = sum(one.fires for one in self.latents)
        masked = f", {len(self.mask) - counted} of them masked" if counted < len(self.mask) else ""
        per_token = f", {fired / counted:.1f} a token" if counted else ""
        fires = f"{len(self.latents):,} latents fire" if len(self.latents) != 1 else "1 latent fires"
        return f"{self.model}, {self.site}: {len(self.mask):,} tokens{masked}; {fires}{per_token}"

    def _by_position(self) -> list[list[Firing]]:
        found: list[list[Firing]] = [[] for _ in self.tokens]
        for one in self.latents:
            for firing in _firings(one):
                found[firing.position].append(firing)
        return [sorted(some, key=lambda one: -abs(one.value)) for some in found]


def _firings(one: PromptLatent) -> list[Firing]:
    effects = one.effects or (None,) * len(one.values)
    places = zip(one.positions, one.values, effects, strict=True)
    return [Firing(one.latent, one.label, *place) for place in places]
