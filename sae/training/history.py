"""What a run has measured: the lines of its log, and these as rows for pandas and its like."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.base.errors import ConfigError, DataError
from sae.base.files import read_json
from sae.base.paths import near
from sae.base.settings import flat

METRICS = "metrics.jsonl"  # in a run's folder


@dataclass(frozen=True)
class Log:
    """The lines of a file of JSON lines, and what of it cannot be read."""

    lines: list[dict[str, Any]]
    damaged: list[int]
    """Numbers of the lines, from 1, that are no JSON object."""
    unfinished: bool
    """Whether the last line has no end: it is being written, or its process has ended. It is not among `lines`."""


def read_log(path: Path) -> Log:
    """Returns what a file of JSON lines holds; DataError names it if it cannot be read."""
    try:
        whole, _, rest = path.read_bytes().rpartition(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    lines, damaged, decode = [], [], json.JSONDecoder().raw_decode
    for number, raw in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            text = raw.decode().strip()
            line, end = decode(text)
        except (ValueError, RecursionError):
            line, end, text = None, 0, ""
        if isinstance(line, dict) and end == len(text):
            lines.append(line)
        else:
            damaged.append(number)
    return Log(lines, damaged, bool(rest))


def history(run: Any) -> list[dict[str, Any]]:
    """Returns a flat row for each coder and step of a run that was logged: `pandas.DataFrame(sae.history(run))`.

    `run` is a run folder, finished or not, or what `sae.train` returned. A row has `step`, `coder`, and the names of
    metrics.jsonl; one of an evaluation has `held_out.reconstruction.fvu` and all that `sae.evaluate` returns under such
    names instead. The last evaluation comes last. ConfigError if the folder is not that of a run, DataError if a
    line of its log is damaged.
    """
    folder = Path(getattr(run, "run_dir", run)).expanduser()
    path = folder / METRICS
    if not path.is_file():
        raise ConfigError(f"run: {folder} holds no {METRICS}; it is not the folder of a run.{near(folder)}")
    log = read_log(path)  # a run that goes on may be in the middle of the last line
    if log.damaged:
        raise DataError(f"{path}: line {log.damaged[0]} is no line of JSON; take it out to read the others")
    rows = log.lines
    if (last := folder / "evaluation.json").is_file():
        found = read_json(last)
        rows += [{"step": found[name]["training"]["steps"], "coder": name, "held_out": found[name]} for name in found]
    return [flat(row) for row in rows]
