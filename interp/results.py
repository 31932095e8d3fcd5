"""Journals -> results.parquet (a row for each latent, explainer and scorer) and summary.json (what it amounts to)."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from interp.flows import FAILED, OK, PARTIAL, Row, measure
from interp.journal import Journal
from interp.metrics import difference, mean
from interp.pipeline import EXPLAIN_KEY, SCORE_KEY
from interp.records import Measure
from interp.scorers import Scorer
from sae.errors import ConfigError
from sae.files import atomic_write, write_json

RESULTS, SUMMARY = "results.parquet", "summary.json"
BEST, SHOWN = 5, 100  # explanations told on the terminal, and characters of each
SCORED = (OK, PARTIAL, FAILED)


def shard_folders(run_dir: Path) -> list[Path]:
    """Returns the folders of all shards of a run; ConfigError if they are not the shards of one division."""
    found = sorted((run_dir / "shards").glob("*-of-*"))
    totals = {folder.name.partition("-of-")[2] for folder in found}
    if len(totals) > 1:
        raise ConfigError(
            f"run_dir: {run_dir} holds shards of {' and '.join(sorted(totals))}; keep those of one division"
        )
    missing = [
        i
        for i in range(1, int(next(iter(totals), "0")) + 1)
        if run_dir / "shards" / f"{i}-of-{next(iter(totals))}" not in found
    ]
    if missing or not found:
        what = f"shard {missing[0]} of {next(iter(totals))} is missing" if missing else "it holds no shards"
        raise ConfigError(f"run_dir: {run_dir}: {what}; run it first")
    return found


def write_results(run_dir: Path, scorers: dict[str, Scorer], about: dict[str, Any]) -> dict[str, Any]:
    """Writes results.parquet and summary.json from the journals of all shards; returns the summary.

    `about` is kept in the summary: what the run was of.
    """
    folders = shard_folders(run_dir)
    explained = [row for folder in folders for row in Journal(folder / "journal-explain.jsonl", EXPLAIN_KEY).rows()]
    score_journals = [Journal(folder / "journal-score.jsonl", SCORE_KEY) for folder in folders]
    nulls = _nulls((row for journal in score_journals for row in journal.rows()), scorers)
    table = list(_table((row for journal in score_journals for row in journal.rows()), scorers, nulls))
    table.sort(key=lambda row: (row["latent"], row["explainer"], row["scorer"]))
    _write_parquet(run_dir / RESULTS, table)
    summary = {**about, "explanations": _explained(explained), "scores": _summed(table, scorers, nulls)}
    summary |= {"spent": _spent(folders), "best": _best(table)}
    write_json(run_dir / SUMMARY, summary)
    return summary


def explanations(run_dir: Path) -> dict[str, dict[int, str]]:
    """Returns by explainer the text of every latent that has one."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for folder in shard_folders(run_dir):
        for row in Journal(folder / "journal-explain.jsonl", EXPLAIN_KEY).rows():
            if row["explanation"]:
                found[row["explainer"]][row["latent"]] = row["explanation"]["text"]
    return dict(found)


def label(row: Row) -> str:
    """Returns a scorer's name with its judge: "detection[gpt-4o-mini]", "detection[rule]", "embedding[tfidf]"."""
    judge = "rule" if row.get("by_rule") else row["judge"]
    return f"{row['scorer']}[{judge}]" if judge else row["scorer"]


def _headline(row: Row, scorers: dict[str, Scorer]) -> Measure:
    return measure(row, scorers[row["scorer"]].headline)


def _nulls(rows: Iterable[Row], scorers: dict[str, Scorer]) -> dict[tuple[str, str], Measure]:
    """By (explainer, label), the mean headline with other latents' explanations, over latents."""
    values: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["null"] and row["scorer"] in scorers and row["status"] in SCORED:
            found = _headline(row, scorers).value
            if found is not None:
                values[row["explainer"], label(row)][row["latent"]] = found
    return {key: mean([found[latent] for latent in sorted(found)]) for key, found in values.items()}


def _table(
    rows: Iterable[Row], scorers: dict[str, Scorer], nulls: dict[tuple[str, str], Measure]
) -> Iterator[dict[str, Any]]:
    """Yields one flat row for every latent, explainer and scorer."""
    for row in rows:
        if row["null"] or row["scorer"] not in scorers:
            continue
        found = _headline(row, scorers)
        null = nulls.get((row["explainer"], label(row)), Measure(None))
        lift = difference(found, null)
        score = row.get("score", {})
        flat = {
            "latent": row["latent"],
            "explainer": row["explainer"],
            "scorer": label(row),
            "explanation": row["explanation"],
            "status": row["status"],
            "reason": row.get("reason", ""),
            "headline": scorers[row["scorer"]].headline,
            "n": score.get("n", 0),
            "coverage": score.get("coverage"),
            "invalid": sum(score.get("invalid", {}).values()),
        }
        flat |= _flat("score", found) | _flat("null", null) | _flat("lift", lift)
        for name, figures in score.get("measures", {}).items():
            flat |= _flat(name, Measure(**figures))
        yield flat


def _flat(name: str, found: Measure) -> dict[str, float | None]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _explained(rows: list[Row]) -> dict[str, Any]:
    by: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        by[row["explainer"]][row["status"]] += 1
    return {name: dict(counts) for name, counts in by.items()}


def _summed(
    table: list[dict[str, Any]], scorers: dict[str, Scorer], nulls: dict[tuple[str, str], Measure]
) -> list[dict[str, Any]]:
    """One entry for every (explainer, scorer): counts by status, mean and quartiles of the headline, null and lift."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in table:
        groups[row["explainer"], row["scorer"]].append(row)
    found = []
    for (explainer, scorer), rows in sorted(groups.items()):
        values = sorted(row["score"] for row in rows if row["score"] is not None)
        null, average = nulls.get((explainer, scorer), Measure(None)), mean(values)
        asked = [row for row in rows if row["status"] in SCORED]
        found.append(
            {
                "explainer": explainer,
                "scorer": scorer,
                "headline": rows[0]["headline"],
                "latents": len(values),
                "statuses": dict(Counter(row["status"] for row in rows)),
                "mean": asdict(average),
                "quartiles": [values[round(q * (len(values) - 1))] for q in (0.25, 0.5, 0.75)] if values else None,
                "null": asdict(null),
                "lift": asdict(difference(average, null)),
                "coverage": sum(row["coverage"] or 0.0 for row in asked) / len(asked) if asked else None,
            }
        )
    return found


def _write_parquet(path: Path, table: list[dict[str, Any]]) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(name for row in table for name in row))
    whole = pa.table({name: [row.get(name) for row in table] for name in columns})
    buffer = io.BytesIO()
    pq.write_table(whole, buffer)
    atomic_write(path, buffer.getvalue())


def lines(summary: dict[str, Any]) -> list[str]:
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
    average, null, lift = (Measure(**one[name]) for name in ("mean", "null", "lift"))
    return (
        f"  {one['scorer']}: {one['headline'].replace('_', ' ')} {told(average)}, null {told(null)}, "
        f"lift {told(lift)}; {one['latents']} latents, coverage {_share(one['coverage'])}"
    )


def _best(table: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By explainer, the latents of the highest scores by its first scorer."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(row["explainer"] for row in table if row["explainer"]):
        rows = [row for row in table if row["explainer"] == name and row["score"] is not None]
        rows = sorted((row for row in rows if row["scorer"] == rows[0]["scorer"]), key=lambda row: -row["score"])
        found[name] = [{key: row[key] for key in ("latent", "score", "scorer", "explanation")} for row in rows[:BEST]]
    return found


def _spent(folders: list[Path]) -> dict[str, Any]:
    """By role, calls and tokens of all commands that worked on the run, and their cost in USD where it is known."""
    total: dict[str, Any] = {}
    for path in (folder / "spent.jsonl" for folder in folders):
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            for role, account in json.loads(line)["roles"].items():
                kept = total.setdefault(role, {})
                for key in ("calls", "cached", "tokens_in", "tokens_out", "usd"):
                    now, before = account[key], kept.get(key, 0)
                    kept[key] = None if now is None or before is None else now + before
    return total


def told(found: Measure) -> str:
    """Returns a figure with its interval, as people read it."""
    if found.value is None:
        return "n/a"
    if found.low is None or found.high is None:
        return f"{found.value:.3f}"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"
