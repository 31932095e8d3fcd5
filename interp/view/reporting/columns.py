"""The index of a run's page: an array a column, so that ten thousand latents are read in a moment.

latents, fired, status                  a number each; `statuses` holds the words
explainers: name, text, status, reason  of each explainer; `texts` holds what they say
  scorers: name, headline, value, low, high, coverage, n, status, reason
scorers                                 that need no label
"""

from collections.abc import Iterable
from typing import Any

from interp.view.record import LatentRecord, LatentScore
from interp.view.reporting.blocks import LONGEST_LISTED, rounded, shown_text


class Words:
    """Texts, each once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str | None) -> int | None:
        """Returns the number of a text; None of none."""
        return self.numbers.setdefault(text, len(self.numbers)) if text else None

    def list(self) -> list[str]:
        """Returns the texts by their numbers."""
        return list(self.numbers)


class Column(dict[str, list[Any]]):
    """Arrays with a value each for every latent; None for one of which nothing was said."""

    def put(self, row: int, **values: Any) -> None:
        """Says the values of a latent."""
        for name, value in values.items():
            column = self.setdefault(name, [])
            column += [None] * (row - len(column))
            column.append(value)

    def whole(self, rows: int) -> dict[str, Any]:
        """Returns the arrays, as long as there are latents."""
        return {name: column + [None] * (rows - len(column)) for name, column in self.items()}


class Columns:
    """The index of the latents that are added."""

    def __init__(self) -> None:
        self.latents, self.own = list[int](), Column()
        self.texts, self.statuses = Words(), Words()
        self.labels: dict[str, Column] = {}
        self.scores: dict[str, dict[str, Column]] = {"": {}}
        self.headlines: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.latents)

    def add(self, record: LatentRecord) -> None:
        """Adds a latent; they come in ascending order."""
        row = len(self.latents)
        self.latents.append(record.latent)
        self.own.put(row, fired=record.fired, status=self.statuses.number(record.status))
        self._put_scores(row, "", record.scores)
        for label in record.labels:
            status, told = self.statuses.number(label.status), (label.text, label.reason)
            text, reason = (self.texts.number(shown_text(one, LONGEST_LISTED)) for one in told)
            self.labels.setdefault(label.explainer, Column()).put(row, text=text, status=status, reason=reason)
            self._put_scores(row, label.explainer, label.scores)

    def _put_scores(self, row: int, explainer: str, scores: Iterable[LatentScore]) -> None:
        columns = self.scores.setdefault(explainer, {})
        for score in scores:
            self.headlines[score.scorer] = score.headline
            found = zip(
                ("value", "low", "high"), (score.measure.value, score.measure.low, score.measure.high), strict=True
            )
            columns.setdefault(score.scorer, Column()).put(
                row,
                **{name: rounded(value) for name, value in found},
                coverage=rounded(score.coverage),
                n=score.n,
                status=self.statuses.number(score.status),
                reason=self.texts.number(shown_text(score.reason, LONGEST_LISTED)),
            )

    def to_json(self) -> dict[str, Any]:
        """Returns the index as plain values."""
        rows = len(self.latents)
        told = {name: self._scorers(name, rows) for name in self.scores}
        labels = [
            {"name": shown_text(name), **column.whole(rows), "scorers": told[name]}
            for name, column in self.labels.items()
        ]
        words = {"texts": self.texts.list(), "statuses": self.statuses.list()}
        return {"latents": self.latents, **self.own.whole(rows), "explainers": labels, "scorers": told[""], **words}

    def _scorers(self, explainer: str, rows: int) -> list[dict[str, Any]]:
        return [
            {"name": shown_text(name), "headline": self.headlines[name], **column.whole(rows)}
            for name, column in self.scores[explainer].items()
        ]
