"""Journals -> what is told of every latent, explainer and scorer: its label, its score, or why there is none."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from interp.evidence.first_pass import stored_evidence
from interp.records import Measure
from interp.run.flows import Row, measure_of
from interp.run.pipeline import FEWEST_FOR_NULL
from interp.run.reasons import FAILED, NONE, OK, PARTIAL, UNASKED, counts_of, main_reason, said_of, told
from interp.run.rundir import asked_in, explained_in, scores_in
from interp.run.tables import Told
from interp.scorers import Scorer
from interp.scoring.metrics import lift_over, mean_measure

SCORED = (OK, PARTIAL)  # of what failed, the few answers are no score
CHANCE = "chance"
NEAR = 64  # rows of explanations that are kept for the next question
FIGURES, SHOWN = "threshold", "tasks"  # rows of scores as far as these fields hold figures, and all that people look at


def label(row: Row) -> str:
    """Returns a scorer's name with its judge: "detection[gpt-4o-mini]", "detection[rule]", "embedding[tfidf]"."""
    judge = "rule" if row.get("by_rule") else row["judge"]
    return f"{row['scorer']}[{judge}]" if judge else row["scorer"]


class Journals:
    """The journals of shards, and what must be known of them all before a row is told."""

    def __init__(self, run_dir: Path, folders: list[Path], scorers: dict[str, Scorer]) -> None:
        self.folders, self.scorers = folders, scorers
        self.journals = [explained_in(folder, "asked") for folder in folders]  # what ended how; rows are got one by one
        self.scores = [scores_in(folder, FIGURES) for folder in folders]
        self._near: dict[tuple[int, str], Row | None] = {}
        self.evidence = stored_evidence(run_dir / "evidence")
        self.labels: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        """By explainer and scorer, the labels of its scores; of an explainer of which nothing is scored, none."""
        self.nulls: dict[tuple[str, str], list[float]] = defaultdict(list)
        for row in self._rows():
            self.labels[row["explainer"], row["scorer"]].setdefault(label(row))
            null = measure_of(row, CHANCE if not row["explainer"] else scorers[row["scorer"]].headline).value
            if (row["null"] or not row["explainer"]) and row["status"] in SCORED and null is not None:
                self.nulls[row["explainer"], label(row)].append(null)
        scored = {explainer for explainer, _ in self.labels}
        unscored = {explainer for journal in self.journals for _, explainer in journal} - scored
        for explainer in unscored or (() if scored else ("",)):
            self.labels[explainer, ""] = {"": None}
        asked = {latent for folder in folders for latent in asked_in(folder)}
        keys = (key for journal in (*self.journals, *self.scores) for key in journal)
        self.latents = sorted(asked | {latent for latent, *_ in keys})

    def null(self, explainer: str, name: str) -> Measure:
        """The mean headline with other latents' explanations, over latents; of what needs none, what guessing gives."""
        values = self.nulls[explainer, name]
        if not explainer:
            return Measure(values[0], values[0], values[0]) if values else Measure(None)
        return mean_measure(values) if len(values) >= FEWEST_FOR_NULL else Measure(None)

    def explained(self) -> dict[str, dict[str, int]]:
        """By explainer, how many latents ended how."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for journal in self.journals:
            for latent, explainer in journal:
                counts[explainer][journal.status((latent, explainer))] += 1
        for found in counts.values():
            found.update({UNASKED: len(self.latents) - found.total()})
        return {name: {status: n for status, n in found.items() if n} for name, found in counts.items()}

    def failures(self) -> dict[str, dict[str, Any]]:
        """By explainer and reason, how many latents have no explanation for it (`latents`), and what was said first."""
        found: dict[str, dict[str, Any]] = defaultdict(dict)
        for journal in self.journals:
            for latent, explainer in sorted(journal):
                if journal.status((latent, explainer)) not in (FAILED, NONE):
                    continue
                row = journal.get((latent, explainer)) or {}
                kind = main_reason(row)
                said = said_of(kind, row.get("messages", {}))
                found[explainer].setdefault(kind, {"latents": 0, "first": said})["latents"] += 1
        return dict(found)

    def table(self, latents: Collection[int] | None = None, until: str = FIGURES) -> Iterator[Told]:
        """Yields one row for every latent (of all, or of some), explainer and scorer, in this order."""
        nulls = {key: self.null(*key) for key in self._keys()}
        by_latent = groupby(self._rows(latents, until), key=lambda row: row["latent"])
        ahead = next(by_latent, None)
        for latent in self.latents if latents is None else sorted(latents):
            while ahead is not None and ahead[0] < latent:
                ahead = next(by_latent, None)
            found: dict[tuple[str, str], Row] = {}
            if ahead is not None and ahead[0] == latent:
                found = {(row["explainer"], row["scorer"]): row for row in ahead[1] if self._counts(row)}
                ahead = next(by_latent, None)
            for pair in sorted(self.labels):
                name = label(found[pair]) if pair in found else next(iter(self.labels[pair]))
                yield self._told(found.get(pair) or self._missing(latent, *pair), pair, name, nulls)

    def _keys(self) -> Iterator[tuple[str, str]]:
        return ((explainer, name) for (explainer, _), names in self.labels.items() for name in names)

    def _rows(self, latents: Collection[int] | None = None, until: str = FIGURES) -> Iterator[Row]:
        """The rows of all scores, or of those of some latents, latent by latent."""
        rows = heapq.merge(*(journal.rows(latents, until) for journal in self.scores), key=lambda row: row["latent"])
        return (row for row in rows if row["scorer"] in self.scorers)

    def _counts(self, row: Row) -> bool:
        """Whether a score is one of the latent's own explanation, as it is now."""
        there = self.explained_row(row["latent"], row["explainer"]) if not row["null"] else None
        now = there["explanation"] if there else None
        return not row["null"] and (now is None or now["text"] == row["explanation"])

    def explained_row(self, latent: int, explainer: str) -> Row | None:
        """Returns the row of a latent's explanation, from whichever shard has it."""
        key = latent, explainer
        if key not in self._near:  # all rows of a latent ask for the same few
            if len(self._near) >= NEAR:
                self._near.clear()
            self._near[key] = next((row for journal in self.journals if (row := journal.get(key))), None)
        return self._near[key]

    def _missing(self, latent: int, explainer: str, scorer: str) -> Row:
        """What stands for a score that is not there: why there is no explanation, or that it was not come to."""
        row = self.explained_row(latent, explainer)
        if row is None:
            reason = "no explanation by it yet" if explainer else "nothing yet"
            return {"latent": latent, "status": UNASKED, "reason": reason}
        text = row["explanation"]["text"] if row["explanation"] else None
        if text is None or not scorer:
            return {**row, "explanation": text}
        return {"latent": latent, "status": UNASKED, "reason": "no score yet", "explanation": text}

    def _told(self, row: Row, pair: tuple[str, str], name: str, nulls: dict[tuple[str, str], Measure]) -> Told:
        explainer, scorer = pair
        headline, score, counts = self.scorers[scorer].headline if scorer else "", row.get("score", {}), counts_of(row)
        figures = score.get("measures", {}) if row["status"] in SCORED else {}
        measures = {measure: Measure(**found) for measure, found in figures.items()}
        found, messages = measures.get(headline, Measure(None)), row.get("messages", {})
        null = nulls[explainer, name] if name else Measure(None)
        lift = lift_over(found, null)
        flat = {
            "latent": row["latent"],
            "explainer": explainer or None,
            "scorer": name or None,
            "status": row["status"],
            "reason": (told(counts, messages) if counts else row["reason"]) or None,
            "explanation": row.get("explanation") or None,
            "headline": headline or None,
            "score": found.value,
            "score_low": found.low,
            "score_high": found.high,
            "null": null.value,
            "lift": lift.value,
            "lift_low": lift.low,
            "lift_high": lift.high,
            "n": score.get("n"),
            "invalid": sum(counts.values()) if score else None,
            "coverage": score.get("coverage"),
            "answers": row.get("answers") or None,
            **self._firing(row["latent"]),
        }
        return Told(flat, measures, counts if score else {}, messages, row)

    def _firing(self, latent: int) -> dict[str, Any]:
        if self.evidence is None or latent >= self.evidence.d_sae:
            return {}
        fired = int(self.evidence.state["fired"][latent])
        return {"fired": fired, "density": fired / max(1, self.evidence.tokens)}
