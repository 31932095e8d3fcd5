"""report.html of a run, from its folder alone: curves, held-out figures, densities, config and environment.

A run that goes on has a report too, of what there is of it. Several runs are one page: curves overlaid, figures side by
side, and the settings that differ.
"""

import os
import re
from collections.abc import Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sae.base.paths import explained_below, told_elsewhere
from sae.base.settings import flat
from sae.base.visible import visible
from sae.evaluation.tables import table
from sae.pages.page import write_page
from sae.training.reporting.comparing import TOLD, differences, doubts, pairs, shared
from sae.training.reporting.curves import curves, held_out_curves
from sae.training.reporting.recorded import Run, labels, read_run

REPORT, TOGETHER = "report.html", "explained.html"  # of one run; of several explained ones below a folder
POINTS, FEWEST, MOST = 24_000, 200, 2_000  # of one figure: of all coders together, and of one
PATH = re.compile(r"""^(\s*(?:-\s+|[\w.]+:\s+)["']?)((?:/|~)[^"'\n]*)""")  # of this machine, in a line of a config


def write_report(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Writes report.html of a run from its folder, finished or not, and returns its path.

    ConfigError if the folder is not that of a run; DataError if no line of its log can be read.
    """
    folder = Path(run_dir)
    return _write([read_run(folder, folder.resolve().name)], Path(out or folder / REPORT))


def write_comparison(run_dirs: Sequence[Path | str], out: Path | str) -> Path:
    """Writes a page that shows several runs beside each other, and returns its path. Raises as `write_report`."""
    folders = [Path(folder) for folder in run_dirs]
    return _write([read_run(*each) for each in zip(folders, labels(folders), strict=True)], Path(out))


def _write(runs: list[Run], out: Path) -> Path:
    several, count = len(runs) > 1, sum(len(run.coders) for run in runs)
    most = max(FEWEST, min(MOST, POINTS // max(1, count)))
    drawn = [found for run in runs for found in _curves(run, most)]
    coders = [_coder(run, number, name) for number, run in enumerate(runs) for name in run.coders]
    for coder, label in zip(coders, _called(coders, runs), strict=True):
        coder["label"] = label
    lines = max((coder["lines"] for coder in coders), default=0)
    differing = differences([flat(run.config) | flat({"environment": run.environment}) for run in runs])
    main = {
        "runs": [_run(run, out) for run in runs],
        "coders": coders,
        "thinned": most if lines > most else 0,
        "tokens": all(run.batch_tokens > 1 for run in runs),
        "pairs": pairs(coders, len(runs)) if several else [],
        "differences": differing,
        "doubts": doubts(differing, runs) if several else [],
    }
    title = " and ".join(run.label for run in runs)
    write_page(out, title, [("sae.training.reporting", "run.js")], [("main", main), ("curves", drawn)])
    return out


def _curves(run: Run, most: int) -> list[dict[str, Any]]:
    """Returns what is drawn of each coder of a run, and adds to what is said of it."""
    found = []
    for name in run.coders:
        training, said = curves(run.lines.get(name, []), run.batch_tokens, most)
        run.said += [f"{visible(name)}: {sentence}" for sentence in said]
        held_out = held_out_curves(run.evaluations.get(name, []), run.batch_tokens)
        found.append({"training": training, "held_out": held_out})
    return found


def _run(run: Run, out: Path) -> dict[str, Any]:
    config = run.folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    timed = [line for line in run.speed if {"step", "seconds", "tokens_per_s"} <= line.keys()]
    speed, _ = curves([{"step": line["step"], "y": line["tokens_per_s"]} for line in timed], run.batch_tokens, MOST)
    steps = max((line["step"] for lines in run.lines.values() for line in lines), default=0)
    return {
        "label": run.label,
        "about": _about(run.config),
        "config": "\n".join(visible(PATH.sub(_shared, line)) for line in text.splitlines()),
        "environment": [[name, shared(value)] for name, value in flat(run.environment).items()],
        "explained": _explained(run, out),
        "said": run.said,
        "finished": run.finished,
        "steps": steps,
        "tokens": steps * run.batch_tokens,
        "wanted": run.config.get("tokens"),
        "seconds": _seconds([line["seconds"] for line in timed]),
        "speed": speed.get("y"),
    }


def _shared(found: re.Match[str]) -> str:
    return found[1] + told_elsewhere(found[2])


def _seconds(logged: list[float]) -> float | None:
    """Returns how long a run took: each of its processes counts from its own first step."""
    last = [a for a, b in pairwise([*logged, 0.0]) if b < a]
    return sum(last) if last else None


def _about(config: dict[str, Any]) -> list[list[str]]:
    """Returns what a run is of, in a few words each."""
    found = flat(config)
    grid = {name: value for name, value in found.items() if name.startswith("grid.")}
    told = {
        "model": found.get("model.name"),
        "reads": found.get("activations.sites"),
        "writes": found.get("activations.targets"),
        "text": found.get("text.source"),
        "rule": found.get("coder.selection.type"),
        **{name.rpartition(".")[2]: values for name, values in grid.items()},
    }
    texts = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in told.items()}
    return [[visible(name), visible(told_elsewhere(str(text)))] for name, text in texts.items() if text]


def _explained(run: Run, out: Path) -> list[dict[str, Any]]:
    """Returns what explained runs are called, and where their pages are as seen from ours, None if there is none."""
    folders = explained_below(run.folder)
    pages = {visible(folder.relative_to(run.folder).as_posix()): folder / REPORT for folder in folders}
    together = Path(os.path.commonpath(folders)) / TOGETHER if len(folders) > 1 else None
    if together and together.is_file():
        pages = {"all in one page": together} | {name: page for name, page in pages.items() if page.is_file()}
    return [{"name": name, "href": _seen_from(out, page) if page.is_file() else None} for name, page in pages.items()]


def _seen_from(out: Path, page: Path) -> str:
    return "./" + quote(Path(os.path.relpath(page.resolve(), out.resolve().parent)).as_posix())


def _coder(run: Run, number: int, name: str) -> dict[str, Any]:
    step, found = run.evaluations[name][-1] if run.evaluations.get(name) else (None, {})
    lines, size = run.lines.get(name, []), run.size(name)
    last = lines[-1] if lines else {}
    return {
        "run": number,
        "name": visible(name),
        "size": size,
        "step": step,
        "figures": {label: get(found) for label, get in TOLD.items()},
        "rows": [[label, visible(text)] for label, text in table(found)] if found else [],
        "training": {key: last.get(key) for key in ("step", "fvu", "l0", "dead_share")},
        "density": _density(found["density"], size) if found and size is not None else None,
        "lines": len(lines),
    }


def _density(density: dict[str, Any], size: int) -> dict[str, Any]:
    """Returns the bars of the histogram of firing densities of all latents, dead ones first."""
    return {
        "labels": ["dead", *(f"1e{edge}" for edge in density["log10_density_edges"][:-1])],
        "counts": [round(size * density["dead_share"]), *density["log10_density_counts"]],
        "tokens": density["counted_over_tokens"],
    }


def _called(coders: list[dict[str, Any]], runs: list[Run]) -> list[str]:
    """Returns what coders are called in plots: where their names differ, and of which of several runs they are."""
    parts = [coder["name"].split("/") for coder in coders]
    same = len(list(takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))))
    ends = ["/".join(part[same:]) or part[-1] for part in parts]
    if len(runs) == 1:
        return ends
    alone = [len(run.coders) == 1 for run in runs]
    labels = [runs[coder["run"]].label for coder in coders]
    return [
        label if alone[coder["run"]] else f"{label}: {end}"
        for coder, label, end in zip(coders, labels, ends, strict=True)
    ]
