"""Run folders looked at from outside: what two equal runs have in common, and what lies in them."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXACT = {"dead_share", "nmse_median", "dense_share_1_percent", "dense_share_10_percent"}
"""Figures that are no sums of floats."""


def result(run: Path) -> dict[str, bytes]:
    """Returns what two equal runs have in common: the log and the coders' files."""
    files = [run / "metrics.jsonl", run / "evaluation.json", *sorted((run / "coders").rglob("*.*"))]
    return {str(file.relative_to(run)): file.read_bytes() for file in files if file.is_file()}


def assert_equal(run: Path, other: Path) -> None:
    """Raises unless both runs have come to the same end."""
    found, wanted = result(run), result(other)
    assert found.keys() == wanted.keys()
    assert "evaluation.json" in wanted
    for name, content in wanted.items():
        assert found[name] == content, name


def assert_figures(found: Any, wanted: Any, path: str = "") -> None:
    """Raises unless the figures of an evaluation are those wanted, sums to the rounding of float64."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), path
        for key in wanted:
            assert_figures(found[key], wanted[key], f"{path}/{key}")
    elif isinstance(wanted, float) and path.rpartition("/")[2] not in EXACT:
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-14), path
    else:
        assert found == wanted, path


def lines(run: Path) -> list[dict[str, Any]]:
    """Returns metrics.jsonl, as far as its lines are whole: a run that goes on may be in the middle of one."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def checkpoints(run: Path) -> list[int]:
    """Returns the steps that have a checkpoint."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def wait_for_checkpoint(run: Path, step: int) -> None:
    """Waits until the checkpoint of a step is whole, which another thread writes."""
    while step not in checkpoints(run):
        time.sleep(0.001)


def files(folder: Path) -> set[str]:
    """Returns the relative paths of all files below a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def error_of(printed: str) -> str:
    """Returns the error of a command, which must be one line and the last."""
    *_, last = printed.splitlines()
    assert last.startswith("error: "), printed
    return last.removeprefix("error: ")


def typed(main: Callable[[list[str]], int], capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Returns what runs a command with some words, and gives its code, standard output and standard error."""

    def run(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
