"""Evidence -> examples: which windows are shown to an explainer, and which a judge must tell apart.

- A window is 32 tokens. Its place (the latent's largest value in its cell) falls uniformly on tokens 8 to 27 of it, as
  far as the row allows.
- Windows that repeat half of what is shown already of the latent, in any part, are left out.
- Silent windows come in tiers: at random; with a token on which the latent usually fires; where a neighbor fires. Each
  is silent at every token that is shown, under all of its context. A tier is never filled from another.
- The i-th silent window has the offset, the length and the marks of the i-th active one (both in the same random
  order), so that neither tells them apart.
"""

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from numpy import ndarray

from interp.evidence.corpus import Corpus
from interp.evidence.places import KINDS, tokens_at
from interp.evidence.second_pass import REACH, Visits
from interp.evidence.tally import Evidence
from interp.records import ACTIVE, SPLITS, TIERS, Examples, Excerpt, Facts, Item, Window
from sae.base.seeding import generator
from sae.base.settings import at_least, choose
from sae.text.decode import Decoder

WINDOW = 32
OFFSETS = (8, 28)  # the place lies on one of these tokens of its window, the last one not among them
DECILES = 10
MARK_SHARE = 0.3  # of its largest value: tokens at or above are marked in fuzzing (arXiv 2410.13928)
GRAM = 4
REPEATED = 0.5
WITHOUT = 0.05  # of the shapes of active windows may be those of no silent one
MIN_ACTIVE, MIN_DOCUMENTS = 10, 5
TOP_TOKENS = 10


@dataclass(frozen=True)
class ExampleConfig:
    """How many windows are shown of a latent, and which."""

    shown: int = 40
    """Active windows of the explain part."""
    contrast: int = 20
    """Silent windows of the explain part that are set against them."""
    valid: int = 20
    """Active windows of the valid part, and as many silent ones."""
    test: int = 50
    """Active windows of the test part, and as many silent ones of each tier."""
    shown_from: str = "deciles"
    """Which active windows are shown: deciles (of each as many), top (the strongest), random, or mix (a fifth of them
    the strongest, the rest by deciles). The test is always by deciles."""

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        choose("examples.shown_from", self.shown_from, ("deciles", "top", "random", "mix"))
        at_least("examples.shown", self.shown, 1)
        at_least("examples.contrast", self.contrast, 0)
        at_least("examples.valid", self.valid, 0)
        at_least("examples.test", self.test, MIN_ACTIVE)


class Shape(NamedTuple):
    """Where a window's place lies in it, how long it is, and which of its tokens are marked."""

    offset: int
    length: int
    marks: tuple[int, ...]


class ExampleMaker:
    """Makes the examples of one latent after the other."""

    def __init__(
        self, evidence: Evidence, visits: Visits, corpus: Corpus, decoder: Decoder, config: ExampleConfig, seed: int
    ) -> None:
        self.evidence, self.visits, self.corpus, self.decoder = evidence, visits, corpus, decoder
        self.config, self.seed = config, seed

    def facts(self, latent: int) -> Facts:
        """Returns what is known of a latent from its counts and its sample."""
        spots = self.visits.spots(latent)
        chosen = (spots.kind == KINDS.index("sample")) & (spots.split == 0)
        values = np.abs(spots.values[chosen, REACH])
        mass: dict[int, float] = {}
        for token, value in zip(self._tokens(spots.position[chosen]), values.tolist(), strict=True):
            mass[token] = mass.get(token, 0.0) + value
        total = sum(mass.values()) or 1.0
        top = sorted(mass, key=lambda token: -mass[token])[:TOP_TOKENS]
        return Facts(
            rates=self.evidence.rates(latent),
            largest=float(np.abs(spots.values).max(initial=0.0)),
            top_tokens=tuple((self.decoder.piece(token), mass[token] / total) for token in top),
            **self.evidence.counts(latent),
        )

    def make(self, latent: int, facts: Facts | None = None) -> Examples:
        """Returns the examples of a latent; `missing` says why where there are too few."""
        facts = facts or self.facts(latent)
        build = _Build(self, latent)
        sizes = {"explain": self.config.shown, "valid": self.config.valid, "test": self.config.test}
        active = {split: build.active(split, sizes[split]) for split in reversed(SPLITS)}  # the test chooses first
        missing, sources = "", self._sources(active["test"])
        if not facts.fired:
            missing = f"dead: it fires on none of {facts.tokens:,} tokens"
        elif len(active["test"]) < MIN_ACTIVE or sources < MIN_DOCUMENTS:
            of = "sections" if self.corpus.meta["split_by"] == "blocks" else "documents"
            missing = f"insufficient: {len(active['test'])} active windows from {sources} {of} in test"
        elif not active["explain"]:
            missing = "insufficient: no active window to explain from"
        wanted = {
            "explain": {"random": self.config.contrast},
            "valid": {"random": self.config.valid},
            "test": dict.fromkeys(TIERS, self.config.test),
        }
        items = {}
        for split in SPLITS:
            silent = [build.silent(split, tier, active[split], n) for tier, n in wanted[split].items()]
            items[split] = tuple([*active[split], *(item for found in silent for item in found)])
        if not missing and not any(item.tier == "random" for item in items["test"]):
            missing = "insufficient: it is silent in no random window of test"
        return Examples(latent, facts, **items, missing=missing)

    def strongest(self, latent: int, n: int) -> list[Excerpt]:
        """Returns up to n windows in which a latent fires most strongly, of all parts, the strongest first."""
        build = _Build(self, latent)
        spots = np.flatnonzero((build.spots.kind <= KINDS.index("top")) & (build.spots.values[:, REACH] != 0))
        spots = spots[np.argsort(-np.abs(build.spots.values[spots, REACH]), kind="stable")]
        deciles, splits = build.deciles()[spots].tolist(), build.spots.split[spots].tolist()
        items = ((build.active_at(*one), split) for *one, split in zip(spots.tolist(), deciles, splits, strict=True))
        found = (Excerpt(item.window, item.decile, SPLITS[split]) for item, split in items if item is not None)
        return list(islice(found, n))

    def _sources(self, items: list[Item]) -> int:
        """How many documents items are from; of a text without documents, how many sections."""
        corpus = self.corpus
        which = corpus.section if corpus.meta["split_by"] == "blocks" else corpus.document
        return len({int(which[item.window.start // corpus.context_length]) for item in items})

    def _tokens(self, positions: Int[ndarray, "m"]) -> list[int]:
        return tokens_at(self.corpus, positions).tolist()


class _Build:
    """One latent's windows while they are chosen."""

    def __init__(self, maker: ExampleMaker, latent: int) -> None:
        self.maker, self.latent = maker, latent
        self.corpus, self.seed = maker.corpus, maker.seed
        self.spots = maker.visits.spots(latent)
        self.seen: set[tuple[int, ...]] = set()
        fires = self.spots.values[:, REACH] != 0
        sample = fires & (self.spots.kind == KINDS.index("sample"))
        strengths = np.abs(self.spots.values[sample, REACH])
        self.edges = np.quantile(strengths, np.arange(1, DECILES) / DECILES) if len(strengths) else np.zeros(0)
        self.pool_fired = _fired_before(self.spots.pool)

    def deciles(self) -> Int[ndarray, "m"]:
        """Returns in which tenth of the uniform sample the value at every place would be."""
        return np.searchsorted(self.edges, np.abs(self.spots.values[:, REACH]), side="right")

    def active(self, split: str, n: int) -> list[Item]:
        """Returns up to n active windows of a part: strongest first where shown, else in random order."""
        spots, how = self.spots, self.maker.config.shown_from if split == "explain" else "deciles"
        here = (spots.split == SPLITS.index(split)) & (spots.values[:, REACH] != 0)
        sample = np.flatnonzero(here & (spots.kind == KINDS.index("sample")))
        sample = sample[self._order(len(sample), split)]
        strongest = np.flatnonzero(here & (spots.kind <= KINDS.index("top")))
        strongest = strongest[np.argsort(-np.abs(spots.values[strongest, REACH]), kind="stable")]
        deciles = self.deciles()
        within = [np.flatnonzero(deciles[sample] == decile) for decile in range(DECILES)]
        turns = np.argsort(np.concatenate([np.arange(len(w)) for w in within]), kind="stable")
        by_decile = sample[np.concatenate(within)[turns]]  # one of each decile, then the next of each
        top = n // 5 if how == "mix" else 0
        orders = {"top": strongest, "random": sample, "deciles": by_decile, "mix": by_decile}
        found: list[Item] = []
        for candidates, limit in ((strongest, top), (orders[how], n)):
            for spot in candidates:
                if len(found) >= limit:
                    break
                item = self.active_at(int(spot), int(deciles[spot]))
                if item is not None:
                    found.append(item)
        if split == "explain":
            return sorted(found, key=lambda item: -item.window.strength)
        return [found[i] for i in self._order(len(found), split, "order")]

    def silent(self, split: str, tier: str, like: list[Item], n: int) -> list[Item]:
        """Returns up to n silent windows of a part and tier, shaped like the active ones, one after the other."""
        shapes = [Shape(i.window.peak, len(i.window.tokens), i.marks) for i in like]
        if not shapes:
            return []
        shapes = [shapes[i % len(shapes)] for i in range(n)]
        number = SPLITS.index(split)
        if tier == "random":
            chosen = np.flatnonzero(self.maker.visits.plan.pool_split == number)
        else:
            chosen = np.flatnonzero((self.spots.split == number) & (self.spots.kind == KINDS.index(tier)))
        chosen = chosen[self._order(len(chosen), split, tier)]
        if tier == "random":
            return self._shaped(tier, shapes, self.maker.visits.plan.pool[chosen], self.pool_fired[:, chosen])
        fired = _fired_before(self.spots.values[chosen] != 0)
        return self._shaped(tier, shapes, self.spots.position[chosen], fired)

    def _shaped(
        self, tier: str, shapes: list[Shape], positions: Int[ndarray, "m"], fired: UInt8[ndarray, "span_1 m"]
    ) -> list[Item]:
        """Gives every shape the first place that has room for it and is silent there (see `_fired_before`).

        Where places run out, short windows still find one when long ones do not. So it ends as soon as more than a few
        shapes have found none: what is found has the shapes of the active windows, the first of them in random order.
        """
        row, place = np.divmod(positions, self.corpus.context_length)
        before, behind = place - self.corpus.first, self.corpus.length[row] - place
        free = np.ones(len(positions), bool)
        found: list[Item] = []
        without = 0
        for shape in shapes:
            start = REACH - shape.offset
            fits = fired[start + shape.length] == fired[start]
            fits &= free & (before >= shape.offset) & (behind >= shape.length - shape.offset)
            for spot in np.flatnonzero(fits):
                free[spot] = False
                window = self._window(int(positions[spot]) - shape.offset, (0.0,) * shape.length, shape.offset)
                if window is not None:
                    found.append(Item(window, tier, marks=shape.marks))
                    break
            else:
                without += 1
                if without > 1 + WITHOUT * len(found):
                    break
        return found

    def active_at(self, spot: int, decile: int) -> Item | None:
        """Returns the window around a place, or None if it repeats what was shown."""
        position = int(self.spots.position[spot])
        row, place = divmod(position, self.corpus.context_length)
        first, length = self.corpus.first, int(self.corpus.length[row])
        draw = generator(self.seed, "offset", self.latent, position)
        offset = int(torch.randint(*OFFSETS, (1,), generator=draw))
        n = min(WINDOW, length - first)
        start = min(max(place - offset, first), length - n)
        values = self.spots.values[spot, REACH - (place - start) :][:n]
        window = self._window(position - place + start, tuple(values.tolist()), place - start)
        if window is None:
            return None
        marks = np.flatnonzero(np.abs(values) >= MARK_SHARE * np.abs(values).max())
        return Item(window, ACTIVE, decile, tuple(marks.tolist()))

    def _window(self, start: int, values: tuple[float, ...], peak: int) -> Window | None:
        """Returns the window that begins at a position, or None if it repeats what was shown.

        It does if half of its runs of four tokens were shown before; if it does not, they are from now on.
        """
        tokens = self.corpus.span(start, len(values))
        grams = set(zip(*(tokens[i:] for i in range(GRAM)), strict=False)) or {tuple(tokens)}
        if len(grams & self.seen) >= REPEATED * len(grams):
            return None
        self.seen |= grams
        text, bounds = self.maker.decoder.window(tokens)
        section = int(self.corpus.section[start // self.corpus.context_length])
        return Window(section, start, tuple(tokens), text, bounds, values, peak)

    def _order(self, n: int, *purpose: str) -> Int[ndarray, "n"]:
        return torch.randperm(n, generator=generator(self.seed, "examples", self.latent, *purpose)).numpy()


def _fired_before(fires: Bool[ndarray, "m span"]) -> UInt8[ndarray, "span_1 m"]:
    """Returns how many tokens around every place fire before each of them, and how many in all.

    Tokens come first, so that one token of all places lies together: every shape is held against all places.
    """
    counts = np.zeros((fires.shape[1] + 1, len(fires)), np.uint8)
    np.cumsum(fires.T, axis=0, dtype=np.uint8, out=counts[1:])
    return counts
