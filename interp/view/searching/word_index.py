"""An inverted index of short texts in fields: which hold all words of a query, and in which field.

A word of a query stands for every word that begins with it; between quotation marks stands a phrase, whose words follow
one another as they are. What is written together ("a.b", or text of a script that sets no blanks) is a phrase too.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sae.text.scripts import SIGN, UNSPACED, folded

Document = Mapping[str, Sequence[str]]
"""Texts by field."""
BEGINS = 0.5  # what the beginning of a word counts, against the whole word
LENGTH = 0.1  # by how much less for each e-fold of a text's length
_PARTS = re.compile(r'"([^"]*)"?|([^\s"]+)')
_FIELD = "\f"
_LAST = "\U0010ffff"


@dataclass(frozen=True)
class Part:
    """A part of a query: a word, or several in a row."""

    signs: tuple[str, ...]
    whole: bool
    """Whether the last word ends there."""


def parts_of(query: str) -> list[Part]:
    """Returns the parts of a query, all of which are to be found."""
    typed = ((signs(quoted or plain), bool(quoted)) for quoted, plain in _PARTS.findall(query))
    return [Part(tuple(found), whole) for found, whole in typed if found]


def signs(text: str) -> list[str]:
    """Returns the words and other signs of a text, in order; of a script without blanks each character."""
    found = SIGN.findall(folded(text).replace("_", " _ "))
    return [one for sign in found for one in (sign if UNSPACED.match(sign) else (sign,))]


class WordIndex:
    """Documents by their words.

    Args:
        documents: each with texts by field.
        weights: how much a word counts, by field; in longer texts it counts a little less.
    """

    def __init__(self, documents: Sequence[Document], weights: Mapping[str, float]) -> None:
        self.weights, self.size = weights, len(documents)
        self.lines: list[str] = []
        """By document, the signs of its fields with blanks around each, a line a text."""
        codes: dict[str, int] = {}
        columns: list[int] = []
        rows: list[int] = []
        values: list[float] = []
        for row, document in enumerate(documents):
            said = {field: [signs(text) for text in document.get(field, ())] for field in weights}
            self.lines.append(_FIELD.join("\n".join(f" {' '.join(one)} " for one in some) for some in said.values()))
            best: dict[str, float] = {}
            for field, one in ((field, one) for field, some in said.items() for one in some):
                weight = weights[field] / (1 + LENGTH * math.log(max(1, len(one))))
                for word in one:
                    best[word] = max(best.get(word, 0.0), weight)
            columns += [codes.setdefault(word, len(codes)) for word in best]
            rows += [row] * len(best)
            values += best.values()
        self._sort(codes, columns, rows, values)

    def _sort(self, codes: dict[str, int], columns: list[int], rows: list[int], values: list[float]) -> None:
        """Keeps the entries in the order of their words, so that those that begin alike stand together."""
        self.words = sorted(codes)
        place = np.empty(len(codes), dtype=np.int64)
        place[[codes[word] for word in self.words]] = np.arange(len(codes))
        column = place[np.array(columns, dtype=np.int64)]
        order = np.argsort(column, kind="stable")
        self.starts = np.searchsorted(column[order], np.arange(len(codes) + 1))
        self.rows = np.array(rows, dtype=np.int32)[order]
        self.values = np.array(values, dtype=np.float32)[order]

    def hits(self, part: Part) -> Float[ndarray, "n"]:
        """Returns for every document how much a part of a query counts there (a phrase as its least word), or 0."""
        *before, last = part.signs
        found = self._word(last, part.whole)
        for word in before:
            found = np.minimum(found, self._word(word, True))
        if before:
            sought = _sought(part)
            found[[row for row in np.flatnonzero(found).tolist() if sought not in self.lines[row]]] = 0.0
        return found

    def fields(self, row: int, part: Part) -> list[str]:
        """Returns the fields of a document in which a part of a query stands, in the order of the weights."""
        sought = _sought(part)
        lines = self.lines[row].split(_FIELD)
        return [field for field, some in zip(self.weights, lines, strict=True) if sought in some]

    def _word(self, word: str, whole: bool) -> Float[ndarray, "n"]:
        found = np.zeros(self.size, dtype=np.float32)
        first = bisect_left(self.words, word)
        there = first < len(self.words) and self.words[first] == word
        if not whole:
            begin = self._entries(first + there, bisect_left(self.words, word + _LAST))
            np.maximum.at(found, self.rows[begin], BEGINS * self.values[begin])
        exact = self._entries(first, first + there)
        found[self.rows[exact]] = np.maximum(found[self.rows[exact]], self.values[exact])
        return found

    def _entries(self, first: int, last: int) -> slice:
        return slice(int(self.starts[first]), int(self.starts[max(first, last)]))


def _sought(part: Part) -> str:
    """A part of a query as it stands in lines."""
    return f" {' '.join(part.signs)}" + (" " if part.whole else "")
