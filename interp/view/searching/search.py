"""Search: the latents of an explained run by words, or by the meaning of their labels.

by words     sum over the query's parts of ln(1 + N / N_p) w_p      all parts occur; N_p of N latents have part p
by meaning   max over a latent's labels of cos(E(label), E(query))

w is the weight of the field in which a part stands: a label that somebody has edited counts more than one that an
explainer wrote, that more than a token on which the latent fires, and that more than one that it promotes. E is the
encoder by which the run's scorers compare texts (`models.encoder`), or TF-IDF.
"""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from interp.client.config import EndpointConfig
from interp.client.local.words import NAME as TFIDF
from interp.run.reasons import UNASKED, why
from interp.view.record import LatentRecord
from interp.view.searching.meaning import Meaning, meaning_of
from interp.view.searching.word_index import Document, Part, WordIndex, parts_of
from sae.base.errors import ConfigError
from sae.base.settings import choose
from sae.base.visible import visible

WAYS = ("words", "meaning")
EDITED, LABEL, FIRES, PROMOTES = "edited label", "label", "fires on", "promotes"
WEIGHTS = {EDITED: 8.0, LABEL: 4.0, FIRES: 2.0, PROMOTES: 1.0}
KEPT = Path("search") / "vectors.safetensors"  # in the folder of a run
LIMIT, LONGEST = 50, 1000
WORDS_ALONE = EndpointConfig(TFIDF, "local")
NONE: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True)
class Found:
    """A latent that a query found."""

    latent: int
    label: str
    """What is shown of it: the edited label, else the best one, else why there is none, with codes for the unseen."""
    score: float
    where: str
    """The field that was found, or of meaning the label that is nearest."""

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain values."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"latent {self.latent}  {self.score:.2f}  {self.label}"


class Searcher:
    """Searches latents by their labels and tokens; what it needs is made at the first query of a kind, and stays.

    Args:
        records: the latents, by ascending id; none is kept.
        encoder: by which labels are compared; without a model, by TF-IDF.
        kept: where vectors of an encoder are kept; nowhere if None.
    """

    def __init__(
        self, records: Iterable[LatentRecord], encoder: EndpointConfig = WORDS_ALONE, kept: Path | None = None
    ) -> None:
        self._config, self._kept, self._lock = encoder, kept, threading.Lock()
        self.latents: list[int] = []
        self.labels: list[str] = []
        self._documents: list[Document] = []
        for record in records:
            self.latents.append(record.latent)
            self.labels.append(_told(record))
            self._documents.append(_document(record))
        self._row = {latent: row for row, latent in enumerate(self.latents)}
        self._index = WordIndex(self._documents, WEIGHTS)
        self._texts = [(row, text) for row, document in enumerate(self._documents) for text in document[LABEL]]
        self._edited: tuple[dict[int, str], WordIndex] = {}, WordIndex([], WEIGHTS)
        self._meaning: Meaning | None = None

    @property
    def encoder(self) -> str:
        """Returns the name of what tells meaning."""
        return self._config.model or TFIDF

    def find(self, query: str, by: str = "words", limit: int = LIMIT, edited: Mapping[int, str] = NONE) -> list[Found]:
        """Returns the latents that a query finds, the best first.

        Args:
            query: words, all of which are sought, also as the beginning of longer ones; "..." is a phrase; the number
                of a latent finds it. Of meaning: any text.
            by: "words" or "meaning".
            limit: how many at most.
            edited: labels that people have given, by latent; they take the place of the others where these are shown.

        ConfigError for another `by`, a query that is too long, and an encoder that cannot be asked.
        """
        choose("by", by, WAYS)
        if len(query) > LONGEST:
            raise ConfigError(f"query: {len(query):,} characters; up to {LONGEST:,} are searched for")
        edited = {latent: visible(text) for latent, text in edited.items() if latent in self._row}
        return (self._by_words if by == "words" else self._by_meaning)(query, limit, edited)

    def _by_words(self, query: str, limit: int, edited: dict[int, str]) -> list[Found]:
        parts, size = parts_of(query), len(self.latents)
        if not parts:
            return []
        rows = [self._row[latent] for latent in edited]
        anew = self._told_anew(edited)
        hits = np.stack([np.concatenate([self._index.hits(part), anew.hits(part)]) for part in parts])
        hits[:, rows] = 0.0  # as they are told anew
        scores, named = _scores(hits), self._row.get(int(query) if query.strip().isdecimal() else -1)
        found = [] if named is None else [self._found(named, edited, _highest(len(parts), size), "its number")]
        for place in _best(scores, limit):
            index, row, shown = (
                (self._index, place, place) if place < size else (anew, place - size, rows[place - size])
            )
            if shown != named:
                found.append(self._found(shown, edited, scores[place], _where(index, row, parts)))
        return found[:limit]

    def _by_meaning(self, query: str, limit: int, edited: dict[int, str]) -> list[Found]:
        if not query.strip():
            return []
        near = self._ready().near(query, list(edited.values()))
        told = [*self._texts, *((self._row[latent], text) for latent, text in edited.items())]
        owners, scores = np.array([row for row, _ in told], dtype=np.int64), np.zeros(len(self.latents), np.float32)
        np.maximum.at(scores, owners, near)
        nearest = {
            row: told[max(np.flatnonzero(owners == row), key=near.__getitem__)][1] for row in _best(scores, limit)
        }
        return [self._found(row, edited, scores[row], text) for row, text in nearest.items()]

    def _told_anew(self, edited: dict[int, str]) -> WordIndex:
        """Returns the index of what has an edited label; a new one only when one has changed."""
        known, index = self._edited
        if known != edited:
            documents = [{**self._documents[self._row[latent]], EDITED: [text]} for latent, text in edited.items()]
            index = WordIndex(documents, WEIGHTS)
            self._edited = edited, index
        return index

    def _ready(self) -> Meaning:
        with self._lock:
            if self._meaning is None:
                self._meaning = meaning_of([text for _, text in self._texts], self._config, self._kept)
        return self._meaning

    def _found(self, row: int, edited: Mapping[int, str], score: float, where: str) -> Found:
        latent = self.latents[row]
        return Found(latent, edited.get(latent, self.labels[row]), float(score), where)


def _told(record: LatentRecord) -> str:
    """What is shown of a latent's label: its text, or why there is none."""
    label = record.label
    return visible((label.text or why(label.status, label.reason)) if label else UNASKED)


def _document(record: LatentRecord) -> Document:
    """The texts of a latent that words are looked for in, as people see them."""
    facts = record.facts
    texts = {
        LABEL: list(dict.fromkeys(label.text for label in record.labels if label.text)),
        FIRES: [token for token, _ in facts.top_tokens] if facts else [],
        PROMOTES: facts.promoted if facts else (),
    }
    return {field: list(map(visible, some)) for field, some in texts.items()}


def _scores(hits: Float[ndarray, "parts n"]) -> Float[ndarray, "n"]:
    """The scores of documents, 0 where a part is missing."""
    counts = np.count_nonzero(hits, axis=1)
    weighed = np.log1p(hits.shape[1] / np.maximum(1, counts)) @ hits
    return np.where(hits.all(axis=0), weighed, 0.0)


def _highest(parts: int, size: int) -> float:
    """The highest score that there can be."""
    return parts * math.log1p(2 * size) * max(WEIGHTS.values())


def _best(scores: Float[ndarray, "n"], limit: int) -> list[int]:
    """The places of the highest scores above 0, of equal ones the first first."""
    above = np.flatnonzero(scores > 0)
    if len(above) > limit:
        least = np.partition(scores[above], -limit)[-limit]
        above = above[scores[above] >= least]
    return above[np.argsort(-scores[above], kind="stable")][:limit].tolist()


def _where(index: WordIndex, row: int, parts: Sequence[Part]) -> str:
    """The fields that the parts of a query stand in."""
    return ", ".join(dict.fromkeys(index.fields(row, part)[0] for part in parts))
