"""Journals -> results.parquet (a row for each latent, explainer and scorer) and summary.json (what it amounts to)."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from interp.client.cache import spent_in
from interp.records import Measure
from interp.run.flows import FAILED, OK, PARTIAL, Row, measure_of
from interp.run.pipeline import FEWEST_FOR_NULL
from interp.run.rundir import CACHE, LATENTS, explained_in, scores_in, shard_folders
from interp.scorers import Scorer
from interp.scoring.metrics import lift_over, mean_measure
from sae.base.files import read_json, write_json, write_whole

RESULTS, SUMMARY = "results.parquet", "summary.json"
BEST, SHOWN = 5, 100  # explanations told on the terminal, and characters of each
SCORED = (OK, PARTIAL)  # of what failed, the few answers are no score
MISSING = "missing"
CHANCE = "chance"
ROWS_AT_ONCE = 10_000


def write_results(run_dir: Path, scorers: dict[str, Scorer], about: dict[str, Any]) -> dict[str, Any]:
    """Writes results.parquet and summary.json from the journals of all shards; returns the summary.

    Every latent that was asked for has its rows, also where it has no score; `about` is kept in the summary: what the
    run was of. Journals are read twice, latent by latent, so that a run of any size is no trouble.
    """
    run = _Run(shard_folders(run_dir), scorers)
    groups: dict[tuple[str, str], _Group] = defaultdict(_Group)
    write_whole(run_dir / RESULTS, lambda path: _write_parquet(path, _summing(run.table(), groups), run.measures))
    summary = {**about, "latents": len(run.latents), "explanations": run.explained()}
    summary["scores"] = [groups[key].summary(*key, run.null(*key)) for key in sorted(groups)]
    summary |= {"spent": _spent(run.folders), "best": _best(groups)}
    write_json(run_dir / SUMMARY, summary)
    return summary


def explanations_of_run(run_dir: Path) -> dict[str, dict[int, str]]:
    """Returns by explainer the text of every latent that has one."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for folder in shard_folders(run_dir):
        for row in explained_in(folder).rows():
            if row["explanation"]:
                found[row["explainer"]][row["latent"]] = row["explanation"]["text"]
    return dict(found)


def label(row: Row) -> str:
    """Returns a scorer's name with its judge: "detection[gpt-4o-mini]", "detection[rule]", "embedding[tfidf]"."""
    judge = "rule" if row.get("by_rule") else row["judge"]
    return f"{row['scorer']}[{judge}]" if judge else row["scorer"]


class _Run:
    """The journals of all shards, and what must be known of them all before a row is written."""

    def __init__(self, folders: list[Path], scorers: dict[str, Scorer]) -> None:
        self.folders, self.scorers = folders, scorers
        self.journals = [explained_in(folder) for folder in folders]
        self.scores = [scores_in(folder) for folder in folders]
        self.labels: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        """By explainer and scorer, the labels of its scores."""
        self.nulls: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.measures: dict[str, None] = {}
        for row in self._rows():
            self.labels[row["explainer"], row["scorer"]].setdefault(label(row))
            self.measures |= dict.fromkeys(row.get("score", {}).get("measures", {}))
            null = measure_of(row, CHANCE if not row["explainer"] else scorers[row["scorer"]].headline).value
            if (row["null"] or not row["explainer"]) and row["status"] in SCORED and null is not None:
                self.nulls[row["explainer"], label(row)].append(null)
        asked = {latent for folder in folders for latent in _latents(folder)}
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
            found.update({MISSING: len(self.latents) - found.total()})
        return {name: {status: n for status, n in found.items() if n} for name, found in counts.items()}

    def table(self) -> Iterator[dict[str, Any]]:
        """Yields one flat row for every latent, explainer and scorer, in this order."""
        nulls = {key: self.null(*key) for key in self._keys()}
        by_latent = groupby(self._rows(), key=lambda row: row["latent"])
        ahead = next(by_latent, None)
        for latent in self.latents:
            found: dict[tuple[str, str], Row] = {}
            if ahead is not None and ahead[0] == latent:
                found = {(row["explainer"], row["scorer"]): row for row in ahead[1] if not row["null"]}
                ahead = next(by_latent, None)
            for pair in sorted(self.labels):
                name = label(found[pair]) if pair in found else next(iter(self.labels[pair]))
                yield self._flat(found.get(pair) or self._missing(latent, pair[0]), pair, name, nulls)

    def _keys(self) -> Iterator[tuple[str, str]]:
        return ((explainer, name) for (explainer, _), names in self.labels.items() for name in names)

    def _rows(self) -> Iterator[Row]:
        """The rows of all scores, latent by latent."""
        rows = heapq.merge(*(journal.rows() for journal in self.scores), key=lambda row: row["latent"])
        return (row for row in rows if row["scorer"] in self.scorers)

    def _missing(self, latent: int, explainer: str) -> Row:
        """What stands for a score that is not there: why there is no explanation, or that it was not come to."""
        status = max(journal.status((latent, explainer)) for journal in self.journals)  # one has it, if any
        return {"latent": latent, "status": MISSING if status in ("", OK) else status, "explanation": ""}

    def _flat(
        self, row: Row, pair: tuple[str, str], name: str, nulls: dict[tuple[str, str], Measure]
    ) -> dict[str, Any]:
        headline, score = self.scorers[pair[1]].headline, row.get("score", {})
        counts = row["status"] in SCORED
        found, null = measure_of(row, headline) if counts else Measure(None), nulls[pair[0], name]
        flat = {
            "latent": row["latent"],
            "explainer": pair[0],
            "scorer": name,
            "explanation": row["explanation"],
            "status": row["status"],
            "reason": row.get("reason", ""),
            "headline": headline,
            "answers": row.get("answers", ""),
            "n": score.get("n", 0),
            "coverage": score.get("coverage"),
            "invalid": sum(score.get("invalid", {}).values()),
        }
        flat |= _columns("score", found) | _columns("null", null) | _columns("lift", lift_over(found, null))
        for measured, figures in score.get("measures", {}).items() if counts else ():
            flat |= _columns(measured, Measure(**figures))
        return flat


@dataclass
class _Group:
    """The rows of one explainer and scorer."""

    headline: str = ""
    values: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    coverage: list[float] = field(default_factory=list)
    best: list[tuple[float, int, str]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        """Takes in a row of the table."""
        self.headline = row["headline"]
        self.statuses[row["status"]] += 1
        if row["status"] in (*SCORED, FAILED):
            self.coverage.append(row["coverage"] or 0.0)
        if row["score"] is not None:
            self.values.append(row["score"])
            self.best = sorted([*self.best, (-row["score"], row["latent"], row["explanation"])])[:BEST]

    def summary(self, explainer: str, scorer: str, null: Measure) -> dict[str, Any]:
        """Counts by status, mean and quartiles of the headline, null and lift."""
        values, average = sorted(self.values), mean_measure(self.values)
        return {
            "explainer": explainer,
            "scorer": scorer,
            "headline": self.headline,
            "latents": len(values),
            "statuses": dict(self.statuses),
            "mean": asdict(average),
            "quartiles": [values[round(q * (len(values) - 1))] for q in (0.25, 0.5, 0.75)] if values else None,
            "null": asdict(null),
            "lift": asdict(lift_over(average, null)),
            "coverage": sum(self.coverage) / len(self.coverage) if self.coverage else None,
        }


def _summing(rows: Iterator[dict[str, Any]], groups: dict[tuple[str, str], _Group]) -> Iterator[dict[str, Any]]:
    for row in rows:
        groups[row["explainer"], row["scorer"]].add(row)
        yield row


def _columns(name: str, found: Measure) -> dict[str, float | None]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _latents(folder: Path) -> list[int]:
    path = folder / LATENTS
    return read_json(path) if path.is_file() else []


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], measures: Iterable[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    figures = [name for one in ("score", "null", "lift", *measures) for name in _columns(one, Measure(None))]
    types = dict.fromkeys(
        ("explainer", "scorer", "explanation", "status", "reason", "headline", "answers"), pa.string()
    )
    types = {"latent": pa.int64(), **types, "n": pa.int64(), "coverage": pa.float64(), "invalid": pa.int64()}
    schema = pa.schema([*types.items(), *((name, pa.float64()) for name in dict.fromkeys(figures))])
    with pq.ParquetWriter(path, schema) as writer:
        while some := list(islice(rows, ROWS_AT_ONCE)):
            columns = {name: [row.get(name) for row in some] for name in schema.names}
            writer.write_table(pa.table(columns, schema))


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Returns a summary as people read it."""
    found = []
    for name, counts in summary["explanations"].items():
        found += ["", f"{name}: {', '.join(f'{n} {status}' for status, n in sorted(counts.items()))}"]
        for one in summary["scores"]:
            if one["explainer"] == name:
                found.append(_line(one))
        for row in summary["best"].get(name, ()):
            text = row["explanation"] if len(row["explanation"]) <= SHOWN else row["explanation"][: SHOWN - 3] + "..."
            found.append(f"  latent {row['latent']:<8} {row['score']:.2f}  {text}")
    return [*found, *(_line(one) for one in summary["scores"] if not one["explainer"])]


def _line(one: dict[str, Any]) -> str:
    average, null, lift = (with_interval(Measure(**one[name])) for name in ("mean", "null", "lift"))
    of = sum(one["statuses"].values())
    return (
        f"  {one['scorer']}: {one['headline'].replace('_', ' ')} {average}, null {null}, lift {lift}; "
        f"{one['latents']} of {of} latents, coverage {_share(one['coverage'])}"
    )


def _best(groups: dict[tuple[str, str], _Group]) -> dict[str, list[dict[str, Any]]]:
    """By explainer, the latents of the highest scores by its first scorer."""
    found: dict[str, list[dict[str, Any]]] = {}
    for explainer, scorer in sorted(groups):
        if explainer and explainer not in found and groups[explainer, scorer].best:
            found[explainer] = [
                {"latent": latent, "score": -score, "scorer": scorer, "explanation": text}
                for score, latent, text in groups[explainer, scorer].best
            ]
    return found


def _spent(folders: list[Path]) -> dict[str, Any]:
    """By role, calls and tokens of all commands that worked on the run, and their cost in USD where it is known."""
    total: dict[str, Any] = {}
    for path in (folder / CACHE for folder in folders):
        for role, account in spent_in(path).items():
            kept = total.setdefault(role, dict.fromkeys(account, 0))
            for key, now in account.items():
                kept[key] = None if now is None or kept[key] is None else kept[key] + now
    return total


def with_interval(found: Measure) -> str:
    """Returns a figure with its interval, as people read it."""
    if found.value is None:
        return "n/a"
    if found.low is None or found.high is None:
        return f"{found.value:.3f}"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"
