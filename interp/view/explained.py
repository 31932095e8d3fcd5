"""An explained run as its folder tells of it: no model is loaded, and nothing but the folder is needed."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.run import rows
from interp.run.journal import Journal
from interp.run.kept import asked_of, excerpts_of, facts_of
from interp.run.latents import ids_among, is_one
from interp.run.reasons import UNASKED
from interp.run.results import results_of, what_is_told
from interp.run.rows import Journals
from interp.run.rundir import saved_config, shard_folders, shown_in
from interp.run.tables import Told
from interp.run.telling import lines_of
from interp.scorers import Scorer
from interp.view import html
from interp.view.examples import LatentExamples, examples_of
from interp.view.notes import Notes
from interp.view.record import Label, LatentRecord, Spread, score_of
from interp.view.searching.search import KEPT, WORDS_ALONE, Found, Searcher
from interp.view.terminal import lines, title
from sae.base.errors import ConfigError
from sae.base.plugins import names
from sae.pages.notebook import table, text_lines

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SHOWN = 20  # latents of a run in a notebook


@dataclass(frozen=True, repr=False)
class Latent(LatentRecord):
    """A latent of an explained run, as shells and notebooks show it: one line; `print` tells all there is."""

    @property
    def examples(self) -> LatentExamples:
        """Returns the windows that are kept of it."""
        return examples_of(self.latent, self.strongest, self.sampled)

    def __repr__(self) -> str:
        scores = [score for score in (self.label.scores if self.label else ()) if score.value is not None]
        told = ", ".join(f"{score.scorer} {score.value:.2f}" for score in scores)
        return f"{title(self)}: {self.told}" + (f" ({told})" if told else "")

    def __str__(self) -> str:
        return "\n".join(lines(self, "", colors=False))

    def _repr_html_(self) -> str:
        return html.page(self)


class ExplainedRun:
    """The folder of a run of sae-explain, finished or not, in shards or merged, or imported.

    `run[508]` is a latent with its labels and scores, `len` the number of latents that were asked for, and iterating
    gives them in order. It tells what its folder held when it was
    first looked at.
    """

    def __init__(self, run_dir: Path, asked: list[int] | None = None, unfinished: str = "") -> None:
        """Opens a folder.

        Args:
            run_dir: the folder.
            asked: latents that are told of first, those of the command that has just run.
            unfinished: why that did not do all of its work, if so.
        """
        self.run_dir, self.asked, self.unfinished = run_dir, asked, unfinished

    @property
    def known(self) -> bool:
        """Returns whether its settings are there; an imported run has none."""
        return (self.run_dir / "config.yaml").is_file()

    @cached_property
    def journals(self) -> Journals:
        """Returns all that is written down of it, read when first asked for."""
        kinds: dict[str, Scorer] = (
            saved_config(self.run_dir).all_scorers()
            if self.known
            else {name: kind() for name, kind in names(Scorer).items()}  # an import has each by the name of its kind
        )
        return Journals(self.run_dir, shard_folders(self.run_dir, whole=False), kinds)

    @cached_property
    def _shown(self) -> list[Journal]:
        return [shown_in(shard, "facts") for shard in self.journals.folders]

    @property
    def d_sae(self) -> int | None:
        """Returns the number of the coder's latents, or None where the folder does not say it."""
        return self.journals.evidence.d_sae if self.journals.evidence else None

    @property
    def latents(self) -> list[int]:
        """Returns the latents that were asked for, ascending."""
        return list(self.journals.latents)

    @cached_property
    def _results(self) -> "tuple[pa.Table, dict[str, Any]]":
        return results_of(self.journals)

    @property
    def summary(self) -> dict[str, Any]:
        """Returns what the run amounts to, as summary.json has it: of each explainer and scorer the mean, the null and
        the lift with their intervals, and by status how many latents there are.
        """
        return what_is_told(self.run_dir) | self._results[1]

    @property
    def nulls(self) -> dict[tuple[str, str], Spread]:
        """Returns by explainer ("" for a scorer that needs no label) and scorer with its judge the scores of all
        latents, and those by the labels of others.
        """
        import pyarrow.compute as pc

        found = self.table().filter(pc.field("score").is_valid())
        own: dict[tuple[str, str], list[float]] = {}
        for row in found.select(["explainer", "scorer", "score"]).to_pylist():
            own.setdefault((row["explainer"] or "", row["scorer"]), []).append(row["score"])
        return {key: Spread(tuple(values), tuple(self.journals.nulls.get(key, ()))) for key, values in own.items()}

    def table(self) -> "pa.Table":
        """Returns results.parquet: a row for each latent, explainer and scorer (interp/README.md has its columns)."""
        return self._results[0]

    def to_pandas(self) -> "pd.DataFrame":
        """Returns `table` for pandas."""
        return self.table().to_pandas()

    def examples(self, latent: Any) -> LatentExamples:
        """Returns the windows that are kept of one latent; ConfigError if there are none, saying how to have some."""
        if not is_one(latent):
            raise TypeError(f"latent: {latent!r} is not the id of one latent; ask for the examples of one at a time")
        record: Latent = self[latent]
        if record.facts is None:
            raise ConfigError(f"latent: {self.run_dir} keeps no examples of {record.latent}{self._way(record.latent)}")
        return record.examples

    def ids(self, given: Any) -> list[int]:
        """Returns the ids that a value stands for (`interp.run.latents`); ConfigError if it names none, or others."""
        return ids_among(self.journals.latents, given, self.d_sae or 2**31)

    def records(self, latents: Collection[int]) -> Iterator[Latent]:
        """Yields the record of each latent, ascending; ConfigError for one that the coder has not."""
        asked, evidence, wanted = set(self.journals.latents), self.journals.evidence, sorted(set(latents))
        edited = self.notes.labels()
        if evidence is None and set(wanted) - asked:
            listed = ", ".join(map(str, sorted(asked)[:10])) + (" ..." if len(asked) > 10 else "")
            raise ConfigError(f"latents: {min(set(wanted) - asked)} is not in {self.run_dir}; it holds {listed}")
        table = groupby(self.journals.table(asked.intersection(wanted), rows.SHOWN), key=lambda one: one.row["latent"])
        for latent in wanted:
            told = list(next(table)[1]) if latent in asked else []
            counts = {"fired": int(evidence.state["fired"][latent]), "tokens": evidence.tokens} if evidence else {}
            plain = tuple(score_of(one) for one in told if one.row["explainer"] is None and one.row["scorer"])
            found = {"labels": tuple(self._labels(latent, told)), "scores": plain, "edited": edited.get(latent)}
            yield Latent(latent, self.d_sae, latent in asked, **counts, **found, **self._examples(latent))

    def largest(self, latents: Collection[int]) -> dict[int, float]:
        """Returns the largest activations by magnitude of latents, explained or not, on the text that the run looked
        at; of one that it knows nothing of, none.
        """
        evidence, asked = self.journals.evidence, set(self.journals.latents)
        if evidence is not None:
            return {latent: evidence.largest(latent) for latent in latents if latent < evidence.d_sae}
        return {one.latent: one.facts.largest for one in self.records(asked.intersection(latents)) if one.facts}

    @cached_property
    def notes(self) -> Notes:
        """Returns bookmarks and edited labels, which people keep beside it on its live page; always the latest ones."""
        return Notes(self.run_dir, self.d_sae)

    @cached_property
    def searcher(self) -> Searcher:
        """Returns what searches its latents; by meaning, with the encoder that its scorers compare texts by."""
        encoder = saved_config(self.run_dir).endpoint("encoder") if self.known else WORDS_ALONE
        return Searcher(self, encoder, self.run_dir / KEPT)

    def search(self, query: str, by: str = "words", limit: int = 20) -> list[Found]:
        """Returns the latents whose labels (edited ones too) and tokens have all words of a query, or whose labels are
        near it in meaning (`by="meaning"`), the best first (`interp.view.searching.search`).
        """
        return self.searcher.find(query, by, limit, self.notes.labels())

    def texts(self, latents: Collection[int]) -> dict[int, str]:
        """Returns what some latents are called, of those that have a label: the edited one, else the best."""
        told: dict[int, list[Told]] = {}
        for one in self.journals.table(set(latents) & set(self.journals.latents)):
            told.setdefault(one.row["latent"], []).append(one)
        labels = {n: LatentRecord(n, None, True, labels=tuple(self._labels(n, rows))).text for n, rows in told.items()}
        edited = {latent: text for latent, text in self.notes.labels().items() if latent in latents}
        return {latent: text for latent, text in labels.items() if text} | edited

    def __len__(self) -> int:
        return len(self.journals.latents)

    def __iter__(self) -> Iterator[Latent]:
        return self.records(self.journals.latents)

    def __contains__(self, latent: object) -> bool:
        return latent in self.journals.latents

    def __getitem__(self, latents: Any) -> Any:
        """Returns a latent by its id, or a list of several: `run[[3, 17]]`, `run[:100]` (those of these ids).

        ConfigError for one that was not asked for, saying how to have it explained.
        """
        ids = self.ids(latents)
        found = list(self.records(ids))
        for record in found:
            if not record.asked:
                why = ": it fires nowhere" if record.dead else self._way(record.latent)
                raise ConfigError(f"latents: {record.latent} is not explained in {self.run_dir}{why}")
        return found[0] if is_one(latents) else found

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        asked = self.asked or self.latents
        told = [record for record in self.records(asked[:SHOWN])]
        rows = [[str(record.latent), record.status, *_told(record)] for record in told]
        more = [f"and {len(asked) - SHOWN:,} more; to_pandas() has them all"] if len(asked) > SHOWN else []
        lines = [line for line in self._lines() if not line.startswith("  latent ")]
        return text_lines(lines) + table(("latent", "status", "label", "score"), rows) + text_lines(more)

    def _lines(self) -> list[str]:
        """What the command prints, below which run it is."""
        many = f"{len(self):,} latents" if len(self) != 1 else "1 latent"
        unfinished = [f"unfinished: {self.unfinished}"] if self.unfinished else []
        table, summary = self._results
        if self.asked is not None:
            import pyarrow.compute as pc

            table = table.filter(pc.field("latent").isin(self.asked))
        return [f"{self.run_dir}: {many}", *unfinished, *lines_of(summary, table, self.asked)]

    def _way(self, latent: int) -> str:
        """How to have a latent explained, as the end of an error."""
        return f"; interp.explain({str(self.run_dir)!r}, latents={latent}) explains it" if self.known else ""

    def _labels(self, latent: int, told: list[Told]) -> Iterator[Label]:
        for explainer in dict.fromkeys(one.row["explainer"] for one in told if one.row["explainer"]):
            mine = [one for one in told if one.row["explainer"] == explainer]
            there = self.journals.explained_row(latent, explainer)
            status, first = there["status"] if there else UNASKED, mine[0].row
            text = first["explanation"]
            scores = tuple(score_of(one) for one in mine if one.row["scorer"]) if text else ()
            by, why = there["by"] if there else "", first["reason"] or ""
            yield Label(explainer, by, text, status, why, scores, asked_of(there or {}))

    def _examples(self, latent: int) -> dict[str, Any]:
        row = next((row for journal in self._shown if (row := journal.get((latent,)))), None)
        if row is None:
            return {}
        windows = {name: excerpts_of(row[name]) for name in ("strongest", "sampled")}
        return {"facts": facts_of(row["facts"]), "missing": row["missing"], **windows}


def _told(record: Latent) -> tuple[str, str]:
    """A latent's label and its score, as cells of a table."""
    scores = record.label.scores if record.label else ()
    score = next((score for score in scores if score.value is not None), None)
    return record.told, f"{score.scorer} {score.measure}" if score else ""
