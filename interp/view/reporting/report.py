"""The report of explained runs: one page that opens from disk, or a folder of pages with an index.

    main      the index of every run, what each amounts to, and how the latents of two runs belong together
    RUN/PART  the latents of a part of a run, so many that one block is read when one is looked at

A page of a server has the same blocks, made when they are asked for.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from interp.run.rundir import run_folder
from interp.view.explained import ExplainedRun
from interp.view.record import LatentRecord
from interp.view.reporting.about import about, names_of
from interp.view.reporting.blocks import latent_of_page, shown_text
from interp.view.reporting.columns import Columns
from interp.view.reporting.pairs import pairs_of
from sae.base import paths
from sae.base.progress import Aside
from sae.pages.page import Asset, write_page

REPORT = "report.html"
PART = 50  # latents of a block
MOST = 10_000  # latents of a page
QUESTIONS = 2_000  # latents of a page of which all questions to models are in it
LARGEST = 64_000_000  # bytes of a page
NAMES = ("hooks", "index", "windows", "scores", "judged", "facts", "latent", "overview", "list", "compared", "pages")
SCRIPTS: tuple[Asset, ...] = tuple(("interp.view", f"{name}.js") for name in NAMES)
START: Asset = ("interp.view", "start.js")
STYLE: Asset = ("interp.view", "explained.css")


def explained_below(path: Path) -> list[Path]:
    """Returns the explained runs in a folder: that itself, or those below it."""
    folder = path.expanduser()
    if (folder / "shards").is_dir():
        return [folder]
    return paths.explained_below(folder)


def write_report(runs: Sequence[Path | str], out: Path | None = None) -> list[Path]:
    """Writes the report of explained runs, and returns the files, the one to open first.

    Args:
        runs: folders of explained runs, of their coders, or of the runs that trained these; several explained runs
            below one folder are tabs, and of two the latents are set side by side.
        out: the file. By default report.html in the folder of the run; of several, in the first folder named.

    Of more than 10,000 latents, or 64 MB, latents are in pages of a folder beside the file, which is then the index.
    Raises ConfigError if a folder holds no explained run.
    """
    given = [Path(one).expanduser() for one in runs]
    folders = [folder for path in given for folder in (explained_below(path) or [run_folder(path)])]
    report = Report([ExplainedRun(folder) for folder in folders])
    target = out or _beside(given, folders)
    if report.many <= MOST:
        _write(target, report, Span())
        if target.stat().st_size <= LARGEST:
            return [target]
    return [target, *_write_parts(target, report)]


def keep_report(run_dir: Path) -> Path | None:
    """Writes the report of a run that has just been told; returns it, or None if it cannot be had, with a warning."""
    with Aside("writing report.html", f"all else is saved, and sae-view {run_dir} writes it again"):
        return write_report([run_dir])[0]
    return None


@dataclass(frozen=True)
class Span:
    """The latents of a page, and where the other ones are."""

    first: int = 0
    last: int = 2**62
    parts: tuple[tuple[int, int, str], ...] = ()
    """(first latent, last one, address) of every page of a folder."""
    index: str = ""
    """Address of the page that lists all."""


class Report:
    """What is told of explained runs, as blocks of a page."""

    def __init__(self, runs: Sequence[ExplainedRun]) -> None:
        self.runs, self.names = list(runs), names_of([run.run_dir for run in runs])

    @property
    def title(self) -> str:
        """Returns what the page is called."""
        return shown_text(" and ".join(self.names), 200) or ""

    @property
    def many(self) -> int:
        """Returns the number of latents that were asked for, of all runs."""
        return sum(len(run) for run in self.runs)

    def main(self, live: bool = False) -> dict[str, Any]:
        """Returns the block that a page begins with."""
        columns = [Columns() for _ in self.runs]
        for run, found in zip(self.runs, columns, strict=True):
            for record in _in_parts(run, run.latents):
                found.add(record)
        return {**self.main_of(columns, Span()), "live": live}

    def block(self, name: str) -> dict[str, Any]:
        """Returns a part of a run by its name, "RUN/PART"; KeyError if there is none."""
        run, _, part = name.partition("/")
        if not (run.isdecimal() and part.isdecimal() and int(run) < len(self.runs)):
            raise KeyError(name)
        chosen, start = self.runs[int(run)], PART * int(part)
        if start >= len(chosen):
            raise KeyError(name)
        return part_of_page(list(chosen.records(chosen.latents[start : start + PART])), questions=True)

    def blocks(self, span: Span, whole: Sequence[Columns] = ()) -> Iterator[tuple[str, Any]]:
        """Yields the blocks of a page, made one after the other; `whole` is told of their latents too."""
        columns = [Columns() for _ in self.runs]
        for number, run in enumerate(self.runs):
            mine = [latent for latent in run.latents if span.first <= latent <= span.last]
            for start in range(0, len(mine), PART):
                records = list(run.records(mine[start : start + PART]))
                for record in records:
                    for found in (columns[number], *whole[number : number + 1]):
                        found.add(record)
                yield f"{number}/{start // PART}", part_of_page(records, self.many <= QUESTIONS)
        yield "main", self.main_of(columns, span)

    def main_of(self, columns: Sequence[Columns], span: Span) -> dict[str, Any]:
        """Returns the first block of a page with these columns of every run."""
        runs = [
            {"name": shown_text(name), **self._about[number], **found.to_json()}
            for number, (name, found) in enumerate(zip(self.names, columns, strict=True))
        ]
        placed = {"parts": span.parts, "index": span.index, "part": PART, "first": span.first, "last": span.last}
        return {"runs": runs, "pairs": self._pairs, "live": False, **placed}

    @cached_property
    def _about(self) -> list[dict[str, Any]]:
        return [about(run) for run in self.runs]

    @cached_property
    def _pairs(self) -> dict[str, Any] | None:
        return pairs_of(*self.runs) if len(self.runs) == 2 else None


def _in_parts(run: ExplainedRun, latents: Sequence[int]) -> Iterator[LatentRecord]:
    """Yields the records of latents, so many at once that their rows are no trouble for memory."""
    for start in range(0, len(latents), PART):
        yield from run.records(latents[start : start + PART])


def part_of_page(records: Sequence[LatentRecord], questions: bool) -> dict[str, Any]:
    """Returns a block of latents; without `questions`, those that models were asked are there for one latent only."""
    latents = [latent_of_page(record) for record in records]
    asked = next((one["latent"] for one in latents if any(found["asked"] for found in _asking(one))), None)
    for one in latents if not questions else ():
        if one["latent"] != asked:
            one["asked_of"] = asked
            for found in _asking(one):
                found["asked"] = []
    return {"latents": latents}


def _asking(latent: dict[str, Any]) -> list[dict[str, Any]]:
    """What may hold a question, in a latent of a page."""
    scores = [score for label in latent["labels"] for score in label["scores"]]
    return [*latent["labels"], *scores, *latent["scores"]]


def _write(target: Path, report: Report, span: Span, whole: Sequence[Columns] = ()) -> None:
    write_page(target, report.title, (*SCRIPTS, START), report.blocks(span, whole), (STYLE,))


def _write_parts(target: Path, report: Report) -> list[Path]:
    """Writes pages of latents into a folder beside the file, and the file as their index; returns those pages."""
    folder, latents = target.with_suffix(""), sorted(latent for run in report.runs for latent in run.latents)
    size, first = min(MOST, PART * 100), 0
    folder.mkdir(parents=True, exist_ok=True)
    cuts = [latents[i : i + size] for i in range(0, len(latents), size)]
    spans = []
    for i, some in enumerate(cuts):
        last = some[-1] if i + 1 < len(cuts) else 2**53 - 1
        spans.append((first, last, f"part-{i + 1:03d}.html"))
        first = last + 1
    whole = [Columns() for _ in report.runs]
    for first, last, name in spans:
        _write(folder / name, report, Span(first, last, tuple(spans), f"../{target.name}"), whole)
    there = tuple((first, last, f"./{folder.name}/{name}") for first, last, name in spans)
    index = [("main", report.main_of(whole, Span(-1, -1, there)))]
    write_page(target, report.title, (*SCRIPTS, START), index, (STYLE,))
    for left in folder.glob("part-*.html"):
        if left.name not in {name for *_, name in spans}:
            left.unlink()
    return [folder / name for *_, name in spans]


def _beside(given: Sequence[Path], folders: Sequence[Path]) -> Path:
    """Where a report is written if nobody says it."""
    if len(folders) == 1:
        return folders[0] / REPORT
    if len(given) == 1:
        return Path(os.path.commonpath(folders)) / ("explained.html" if (given[0] / REPORT).exists() else REPORT)
    return folders[0] / f"report-{names_of(folders)[1].replace('/', '-')}.html"
