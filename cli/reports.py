"""sae-view RUN [RUN ...]: writes the page of a run, or one of several beside each other."""

import argparse
from pathlib import Path

from sae.base.errors import ConfigError
from sae.base.paths import check_file, near

from .running import DONE
from .telling import report

TRAINED, EXPLAINED = "a training run", "an explained run"
COMPARISON = "comparison.html"  # where the page of several runs is written, here


def report_on(options: argparse.Namespace) -> int:
    """Writes the page of a run into its folder, or a comparison of several; tells the paths, one a line."""
    folders = [Path(run).expanduser() for run in options.runs]
    kinds = [kind_of(folder) for folder in folders]
    if len(set(kinds)) > 1:
        told = ", ".join(f"{folder} is {kind}" for folder, kind in zip(folders, kinds, strict=True))
        raise ConfigError(f"RUN: {told}; runs of one kind are compared")
    several = len(folders) > 1
    out = Path(options.out or COMPARISON).expanduser() if options.out or several else None
    if out is not None:
        check_file(out, "--out")
    written = _explained(folders, out) if kinds[0] == EXPLAINED else _trained(folders, out)
    report(options.json, {"written": written}, map(str, written))
    return DONE


def kind_of(folder: Path) -> str:
    """Returns what kind of run a folder is of; ConfigError, with the nearest one, if it is none."""
    if not folder.is_dir():
        raise ConfigError(f"RUN: no such folder: {folder}.{near(folder)}")
    if (folder / "shards").is_dir():
        return EXPLAINED
    if (folder / "metrics.jsonl").is_file():
        return TRAINED
    if any(folder.glob("explain*/**/shards")):  # of a released coder, or one of several of a run
        return EXPLAINED
    inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    around = [up for up in folder.absolute().parents if (up / "metrics.jsonl").is_file() or (up / "shards").is_dir()]
    meant = f" Did you mean {str((around or inside)[0])!r}?" if around or inside else ""
    raise ConfigError(
        f"RUN: {folder} is no run: it holds no metrics.jsonl, which sae-train writes, and no shards, which sae-explain "
        f"writes.{meant}"
    )


def _trained(folders: list[Path], out: Path | None) -> list[Path]:
    from sae.training.recorded import explained_below
    from sae.training.report import write_comparison, write_report

    if len(folders) > 1 and out is not None:
        return [write_comparison(folders, out)]
    written = write_report(folders[0], out)
    if not explained_below(folders[0]):
        return [written]
    explained = _explained(folders, None)
    return [write_report(folders[0], out), *explained]  # again: now there is something to link to


def _explained(folders: list[Path], out: Path | None) -> list[Path]:
    from interp.view.report import write_report

    return write_report(folders, out)
