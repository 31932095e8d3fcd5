"""sae-view RUN [RUN ...]: writes the page of a run, or one of several beside each other."""

import argparse
from pathlib import Path

from sae.base.errors import ConfigError
from sae.base.paths import check_file, explained_below, near
from sae.base.units import data_size

from .running import DONE, log
from .telling import report

TRAINED, EXPLAINED = "a training run", "an explained run"
REPORT = "report.html"
LARGEST = 64_000_000  # bytes of a report that goes to the hub with its coder
COMPARISON = "comparison.html"  # where the page of several runs is written, here


def report_on(options: argparse.Namespace) -> int:
    """Writes the page of a run into its folder, or a comparison of several; tells the paths, one a line."""
    written = written_of([Path(run).expanduser() for run in options.runs], options.out)
    report(options.json, {"written": written}, map(str, written))
    return DONE


def written_of(folders: list[Path], file: str | None = None) -> list[Path]:
    """Writes the page of a run, or of several, into a file or where it belongs; returns the paths, the first one first.

    ConfigError for what is no run, or runs of several kinds.
    """
    kinds = [kind_of(folder) for folder in folders]
    if len(set(kinds)) > 1:
        told = ", ".join(f"{folder} is {kind}" for folder, kind in zip(folders, kinds, strict=True))
        raise ConfigError(f"RUN: {told}; runs of one kind are compared")
    several = len(folders) > 1
    out = Path(COMPARISON if file is None else file).expanduser() if file is not None or several else None
    if out is not None:
        check_file(out, "--out", REPORT)
    return _explained(folders, out) if kinds[0] == EXPLAINED else _trained(folders, out)


def kind_of(folder: Path) -> str:
    """Returns what kind of run a folder is of; ConfigError, with the nearest one, if it is none."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"RUN: {folder} is a file; give the folder of a run")
    if not folder.is_dir():
        raise ConfigError(f"RUN: no such folder: {folder}.{near(folder, folders=True)}")
    if (folder / "shards").is_dir():
        return EXPLAINED
    if (folder / "metrics.jsonl").is_file():
        return TRAINED
    if explained_below(folder):  # of a released coder, or one of several of a run
        return EXPLAINED
    inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    around = [up for up in folder.absolute().parents if (up / "metrics.jsonl").is_file() or (up / "shards").is_dir()]
    meant = f" Did you mean {str((around or inside)[0])!r}?" if around or inside else ""
    raise ConfigError(
        f"RUN: {folder} is no run: it holds no metrics.jsonl, which sae-train writes, and no shards, which sae-explain "
        f"writes.{meant}"
    )


def reports_beside(typed: str) -> dict[str, Path]:
    """Returns the reports that are there of a coder, or of the run that trained it, by what they are called with it.

    They hold what a run tells of itself and of text that it read, and no key. One that is too large, or has its latents
    in further pages, is left out with a line that says so.
    """
    folder = Path(typed).expanduser().absolute()
    if not folder.is_dir():
        return {}
    root = next((up.parent for up in (folder, *folder.parents) if up.name == "coders"), folder)
    own = folder.relative_to(root / "coders") if root != folder else Path()
    explained = [root / "explain" / own, root / "explain", folder / "explain"]
    places = [root / REPORT, root / "explained.html", *(one / REPORT for one in explained)]
    places += sorted(folder.glob("explain*/**/report.html"))
    found: dict[str, Path] = {}
    for page in filter(Path.is_file, dict.fromkeys(places)):
        size = page.stat().st_size
        if size > LARGEST or page.with_suffix("").is_dir():
            why = f"{data_size(size)}, of {data_size(LARGEST)} at most" if size > LARGEST else "it has further pages"
            log.warning("%s is not put beside the coder: %s", page, why)
            continue
        found[page.relative_to(root).as_posix()] = page
    return found


def _trained(folders: list[Path], out: Path | None) -> list[Path]:
    from sae.training.reporting.report import write_comparison, write_report

    if len(folders) > 1 and out is not None:
        return [write_comparison(folders, out)]
    written = write_report(folders[0], out)
    if not explained_below(folders[0]):
        return [written]
    explained = _explained(folders, None)
    return [write_report(folders[0], out), *explained]  # again: now there is something to link to


def _explained(folders: list[Path], out: Path | None) -> list[Path]:
    from interp.view.reporting.report import write_report

    return write_report(folders, out)
