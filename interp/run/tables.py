"""The tables of a run: what people query, narrow, and all figures of every score beside it, a row each.

    results.parquet    a row for each latent, explainer and scorer
    measures.parquet   a row for each of these and measure

What is not there is null, never NaN or an empty text. Where nothing of an explainer is scored, it has one row a latent,
with no scorer.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from interp.records import Measure
from sae.base.files import write_whole

if TYPE_CHECKING:
    import pyarrow as pa

RESULTS, MEASURES = "results.parquet", "measures.parquet"
ROWS_AT_ONCE = 10_000
BEST = 5  # explanations that are told of many
KEY = {"latent": "int64", "explainer": "string", "scorer": "string"}
COLUMNS = {
    **KEY,
    **dict.fromkeys(("status", "reason", "explanation", "headline"), "string"),
    **dict.fromkeys(("score", "score_low", "score_high", "null", "lift", "lift_low", "lift_high"), "double"),
    **dict.fromkeys(("n", "invalid"), "int64"),
    "coverage": "double",
    "answers": "string",
    "fired": "int64",
    "density": "double",
}
"""Of results.parquet, with their types; interp/README.md says what each one holds."""
MEASURE_COLUMNS = {**KEY, "measure": "string", "value": "double", "low": "double", "high": "double"}
"""Of measures.parquet."""


class Told(NamedTuple):
    """One row of the table, and what stands beside it."""

    row: dict[str, Any]
    """By the columns of `COLUMNS`; None where there is nothing."""
    measures: dict[str, Measure]
    """All figures of the score."""
    invalid: dict[str, int]
    """Missing answers by kind,"""
    messages: dict[str, str]
    """and what was said the first time."""
    source: Mapping[str, Any] = {}
    """The row of a journal that it tells of."""


def write_tables(run_dir: Path, table: Iterator[Told]) -> None:
    """Writes both tables of a run, each whole or not at all."""
    write_whole(run_dir / RESULTS, lambda results: write_whole(run_dir / MEASURES, lambda m: _write(results, m, table)))


def _write(results: Path, measures: Path, table: Iterator[Told]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schemas = [_schema(columns) for columns in (COLUMNS, MEASURE_COLUMNS)]
    with pq.ParquetWriter(results, schemas[0]) as narrow, pq.ParquetWriter(measures, schemas[1]) as long:
        while some := list(islice(table, ROWS_AT_ONCE)):
            narrow.write_table(pa.Table.from_pylist([one.row for one in some], schemas[0]))
            long.write_table(pa.Table.from_pylist([row for one in some for row in _figures(one)], schemas[1]))


def as_table(told: Iterator[Told]) -> "pa.Table":
    """Returns what results.parquet would hold."""
    import pyarrow as pa

    return pa.Table.from_pylist([one.row for one in told], _schema(COLUMNS))


def _schema(columns: Mapping[str, str]) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])


def _figures(one: Told) -> Iterator[dict[str, Any]]:
    key = {name: one.row[name] for name in KEY}
    for name, found in one.measures.items():
        yield {**key, "measure": name, "value": found.value, "low": found.low, "high": found.high}


def read_rows(run_dir: Path, latents: Collection[int] | None = None) -> "pa.Table":
    """Returns results.parquet, of all latents or of some."""
    import pyarrow.parquet as pq

    return pq.read_table(run_dir / RESULTS, filters=None if latents is None else [("latent", "in", list(latents))])


def best_of(table: "pa.Table", n: int = BEST) -> dict[str, list[dict[str, Any]]]:
    """Returns by explainer the n rows of the highest scores by its first scorer."""
    import pyarrow.compute as pc

    scored = table.filter(pc.field("score").is_valid() & pc.field("explainer").is_valid())
    scored = scored.sort_by([("scorer", "ascending"), ("score", "descending"), ("latent", "ascending")])
    found = {}
    for explainer in sorted(scored["explainer"].unique().to_pylist()):
        mine = scored.filter(pc.field("explainer") == explainer)
        found[explainer] = mine.filter(pc.field("scorer") == mine["scorer"][0]).slice(0, n).to_pylist()
    return found
