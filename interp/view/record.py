"""A latent as its run's folder tells of it: labels, scores, firing statistics and windows. No model is loaded."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.records import Facts, Window
from interp.run.reasons import UNASKED
from interp.run.rows import Journals
from interp.run.rundir import saved_config, shard_folders, shown_in
from interp.run.tables import Told
from interp.scorers import Scorer
from sae.base.errors import ConfigError
from sae.base.plugins import names


@dataclass(frozen=True)
class Label:
    """What one explainer says of a latent, and how well that does."""

    explainer: str
    by: str
    """The language model that wrote it, if one did."""
    text: str | None
    status: str
    reason: str
    """Why there is no text."""
    scores: tuple[Told, ...]
    """A row of the table for each scorer."""


@dataclass(frozen=True)
class LatentRecord:
    """All that a folder tells of one latent."""

    latent: int
    d_sae: int | None
    """Latents of the coder, where the folder says it."""
    asked: bool
    """Whether a command was about it."""
    fired: int | None = None
    """Tokens on which it fires; None where the folder holds no evidence."""
    tokens: int | None = None
    """Tokens that were looked at."""
    facts: Facts | None = None
    """None where no examples are kept of it: it was not asked for, or by an older version."""
    missing: str = ""
    """Why it has too few examples to be scored, if so."""
    strongest: tuple[Window, ...] = ()
    sampled: tuple[Window, ...] = ()
    labels: tuple[Label, ...] = ()
    scores: tuple[Told, ...] = ()
    """Of scorers that need no label."""

    @property
    def dead(self) -> bool:
        """Returns whether it fires nowhere in the text."""
        return self.fired == 0


@dataclass
class ExplainedRun:
    """The folder of a run of sae-explain, finished or not, in shards or merged, or imported."""

    folder: Path
    shards: list[Path] = field(init=False)
    journals: Journals = field(init=False)

    def __post_init__(self) -> None:
        self.shards = shard_folders(self.folder, whole=False)
        known = (self.folder / "config.yaml").is_file()
        kinds: dict[str, Scorer] = (
            saved_config(self.folder).all_scorers()
            if known
            else {name: kind() for name, kind in names(Scorer).items()}  # an import has each by the name of its kind
        )
        self.journals = Journals(self.folder, self.shards, kinds)
        self.shown = [shown_in(shard) for shard in self.shards]

    @property
    def d_sae(self) -> int | None:
        """Returns the number of the coder's latents, or None where the folder does not say it."""
        return self.journals.evidence.d_sae if self.journals.evidence else None

    def records(self, latents: Collection[int]) -> Iterator[LatentRecord]:
        """Yields the record of each latent, ascending; ConfigError for one that the coder has not."""
        asked, evidence = set(self.journals.latents), self.journals.evidence
        rows: dict[int, list[Told]] = {latent: [] for latent in sorted(latents)}
        if evidence is None and rows.keys() - asked:
            listed = ", ".join(map(str, sorted(asked)[:10])) + (" ..." if len(asked) > 10 else "")
            raise ConfigError(f"latents: {min(rows.keys() - asked)} is not in {self.folder}; it holds {listed}")
        for one in self.journals.table(rows.keys() & asked):
            rows[one.row["latent"]].append(one)
        for latent, told in rows.items():
            counts = {"fired": int(evidence.state["fired"][latent]), "tokens": evidence.tokens} if evidence else {}
            plain = tuple(one for one in told if one.row["explainer"] is None and one.row["scorer"])
            found = {"labels": tuple(self._labels(latent, told)), "scores": plain}
            yield LatentRecord(latent, self.d_sae, latent in asked, **counts, **found, **self._examples(latent))

    def _labels(self, latent: int, told: list[Told]) -> Iterator[Label]:
        for explainer in dict.fromkeys(one.row["explainer"] for one in told if one.row["explainer"]):
            mine = [one for one in told if one.row["explainer"] == explainer]
            there = self.journals.explained_row(latent, explainer)
            status, first = there["status"] if there else UNASKED, mine[0].row
            text = first["explanation"]
            scores = tuple(one for one in mine if one.row["scorer"]) if text else ()
            yield Label(explainer, there["by"] if there else "", text, status, first["reason"] or "", scores)

    def _examples(self, latent: int) -> dict[str, Any]:
        row = next((row for journal in self.shown if (row := journal.get((latent,)))), None)
        if row is None:
            return {}
        windows = {name: tuple(_window(one) for one in row[name]) for name in ("strongest", "sampled")}
        return {"facts": _facts(row["facts"]), "missing": row["missing"], **windows}


def _window(data: dict[str, Any]) -> Window:
    values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in data.items()}
    return Window(**values)


def _facts(data: dict[str, Any]) -> Facts:
    pairs = {name: tuple(map(tuple, data[name])) for name in ("top_tokens", "neighbors")}
    lists = {name: tuple(data[name]) for name in ("histogram", "positions", "promoted", "suppressed")}
    return Facts(**{**data, **lists, **pairs})
