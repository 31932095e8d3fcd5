"""Runs beside each other: coders that correspond, settings that differ, and what speaks against comparing them."""

from collections.abc import Callable, Sequence
from typing import Any

from sae.base.paths import without_places
from sae.base.visible import visible
from sae.training.reporting.recorded import Run


def _at(part: str, name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda found: found.get(part, {}).get(name)


TOLD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "FVU": _at("reconstruction", "fvu"),
    "L0": _at("reconstruction", "l0"),
    "dead share": _at("density", "dead_share"),
    "CE recovered": _at("loss", "ce_recovered"),
    "CE added (nats)": _at("loss", "ce_added"),
    "KL score": _at("loss", "kl_score"),
    "CE recovered, second model": _at("loss_second", "ce_recovered"),
    "normalized MSE, mean": _at("reconstruction", "nmse_mean"),
    "cosine": _at("reconstruction", "cosine"),
    "norm ratio": _at("reconstruction", "norm_ratio"),
    "reconstruction bias": _at("reconstruction", "reconstruction_bias"),
    "share of latents on > 10 % of tokens": _at("density", "dense_share_10_percent"),
    "held-out tokens": _at("reconstruction", "tokens"),
}
"""The held-out figures that coders are compared by, in the order of pages, each found in what `evaluate` returned."""
MEASURED_ON = ("model.", "second_model.", "text.", "activations.", "eval.tokens")
NO_MATTER = {f"activations.{name}" for name in ("block_rows", "lanes", "prefetch_blocks", "path")} | {"text.streaming"}


def pairs(coders: Sequence[dict[str, Any]], runs: int) -> list[list[int | None]]:
    """Returns which coders of several runs correspond: a list of their places, by run; None where a run has none.

    They do by name; and those of runs that have one each, whatever it is called.
    """
    by_run = [[i for i, coder in enumerate(coders) if coder["run"] == run] for run in range(runs)]
    if all(len(some) == 1 for some in by_run):
        return [[i for (i,) in by_run]]
    names = dict.fromkeys(coder["name"] for coder in coders)
    return [[next((i for i in some if coders[i]["name"] == name), None) for some in by_run] for name in names]


def differences(settings: Sequence[dict[str, Any]]) -> list[list[str | None]]:
    """Returns [field, value of each run ...] of the settings that differ; None where a run has no such field."""
    names = sorted({name for one in settings for name in one} - {"run_dir"})
    differing = [name for name in names if len({str(one[name]) if name in one else None for one in settings}) > 1]
    return [[name, *(shared(one[name]) if name in one else None for one in settings)] for name in differing]


def shared(value: Any) -> str:
    """Returns a setting as a page tells it, which others may see: without where things lie on this machine."""
    return visible(str(without_places(value)))


def doubts(differing: Sequence[Sequence[str | None]], runs: Sequence[Run]) -> list[str]:
    """Returns why the figures of runs cannot be compared just like that, in sentences."""
    names = [str(row[0]) for row in differing if str(row[0]).startswith(MEASURED_ON) and row[0] not in NO_MATTER]
    found = [f"Held-out figures were not measured on the same: {', '.join(names)} differ."] if names else []
    unfinished = [run.label for run in runs if not run.finished]
    if unfinished:
        found.append(f"Not finished: {', '.join(unfinished)}; figures are those of the step that is told.")
    return found
