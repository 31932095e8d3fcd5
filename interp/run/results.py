"""Journals -> results.parquet (a row for each latent, explainer and scorer), measures.parquet (all their figures) and
summary.json (what they amount to).
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.client.cache import spent_in
from interp.records import Measure
from interp.run.preparing import TEXT
from interp.run.reasons import FAILED, said_of
from interp.run.rows import SCORED, Journals
from interp.run.rundir import CACHE, ENVIRONMENT, explained_in, shard_folders
from interp.run.tables import Told, as_table, best_of, read_rows, write_tables
from interp.scorers import Scorer
from interp.scoring.metrics import lift_over, mean_measure
from sae.base.files import read_json, write_json

if TYPE_CHECKING:
    import pyarrow as pa

SUMMARY = "summary.json"


def write_results(run_dir: Path, scorers: dict[str, Scorer], about: dict[str, Any]) -> dict[str, Any]:
    """Writes both tables and summary.json from the journals of all shards; returns the summary.

    Every latent that was asked for has its rows, also where it has no label or score: then they say why. By explainer,
    and by explainer and scorer, the numbers of latents by status add up to all of them. `about` is kept in the summary:
    what the run was of. Journals are read twice, latent by latent, so that a run of any size is no trouble.
    """
    run = Journals(run_dir, shard_folders(run_dir), scorers)
    groups: dict[tuple[str, str], _Group] = defaultdict(_Group)
    write_tables(run_dir, _summing(run.table(), groups))
    summary = about | _summary(run, groups, read_rows(run_dir))
    write_json(run_dir / SUMMARY, summary)
    return summary


def results_of(run: Journals) -> "tuple[pa.Table, dict[str, Any]]":
    """Returns the table and the summary of what journals tell now; nothing is written."""
    groups: dict[tuple[str, str], _Group] = defaultdict(_Group)
    table = as_table(_summing(run.table(), groups))
    return table, _summary(run, groups, table)


def what_is_told(run_dir: Path) -> dict[str, Any]:
    """Returns what a run was of, as its summary has it; nothing of one that was imported."""
    if not (run_dir / ENVIRONMENT).is_file():
        return {}
    text = run_dir / "evidence" / TEXT
    return read_json(run_dir / ENVIRONMENT)["about"] | {"text_seen": read_json(text) if text.is_file() else {}}


def explanations_of_run(run_dir: Path) -> dict[str, dict[int, str]]:
    """Returns by explainer the text of every latent that has one."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for folder in shard_folders(run_dir):
        for row in explained_in(folder).rows():
            if row["explanation"]:
                found[row["explainer"]][row["latent"]] = row["explanation"]["text"]
    return dict(found)


@dataclass
class _Group:
    """The rows of one explainer and scorer."""

    headline: str = ""
    values: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    coverage: list[float] = field(default_factory=list)
    invalid: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)

    def add(self, one: Told) -> None:
        """Takes in a row of the table."""
        row = one.row
        self.headline = row["headline"]
        self.statuses[row["status"]] += 1
        self.invalid.update(one.invalid)
        self.messages = {**one.messages, **self.messages}
        if row["status"] in (*SCORED, FAILED):
            self.coverage.append(row["coverage"] or 0.0)
        if row["score"] is not None:
            self.values.append(row["score"])

    def summary(self, explainer: str, scorer: str, null: Measure) -> dict[str, Any]:
        """Counts by status, mean and quartiles of the headline, null and lift; answers that are missing, by reason."""
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
            "invalid": {
                kind: {"answers": n, "first": said_of(kind, self.messages)} for kind, n in sorted(self.invalid.items())
            },
        }


def _summing(table: Iterator[Told], groups: dict[tuple[str, str], _Group]) -> Iterator[Told]:
    for one in table:
        groups[one.row["explainer"] or "", one.row["scorer"] or ""].add(one)
        yield one


def _summary(run: Journals, groups: "Mapping[tuple[str, str], _Group]", table: "pa.Table") -> dict[str, Any]:
    """What rows amount to, once all of them are in the table and in their groups."""
    found = {"latents": len(run.latents), "explanations": run.explained(), "failures": run.failures()}
    found["scores"] = [groups[key].summary(*key, run.null(*key)) for key in sorted(groups) if key[1]]
    return found | {"spent": _spent(run.folders), "best": _best(table)}


def _best(table: "pa.Table") -> dict[str, list[dict[str, Any]]]:
    best = best_of(table)
    told = ("latent", "score", "scorer", "explanation")
    return {explainer: [{name: row[name] for name in told} for row in rows] for explainer, rows in best.items()}


def _spent(folders: list[Path]) -> dict[str, Any]:
    """By role, calls and tokens of all commands that worked on the run, and their cost in USD where it is known."""
    total: dict[str, Any] = {}
    for path in (folder / CACHE for folder in folders):
        for role, account in spent_in(path).items():
            kept = total.setdefault(role, dict.fromkeys(account, 0))
            for key, now in account.items():
                kept[key] = None if now is None or kept[key] is None else kept[key] + now
    return total
