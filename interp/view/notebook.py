"""What a notebook calls: an explained run and the examples of a latent, as objects that show themselves."""

import os
from pathlib import Path
from typing import Any

from interp.run.rundir import run_folder
from interp.view.examples import LatentExamples
from interp.view.explained import ExplainedRun


def results(run: Any) -> ExplainedRun:
    """Returns what a run of `explain` or sae-explain has found so far; nothing is computed, and no model is loaded.

    `run` is its folder, that of the coder or of the run that trained it, or what `sae.train` or `explain` returned.
    ConfigError if there is no explained run there, or several.
    """
    if isinstance(run, ExplainedRun):
        return run
    return ExplainedRun(run_folder(folder_of(run)))


def examples(run: Any, latent: Any) -> LatentExamples:
    """Returns the windows of a latent that an explained run keeps, the largest activations first.

    `run` as in `results`; `latent` is an id. `.top(5)` are the first five; each has `tokens`, `activations`, and a text
    in which the tokens that fire are marked. What the coder's mask leaves out (BOS and other special tokens, attention
    sinks) fires nowhere, as in training. ConfigError if the latent is not explained there, saying how it will be.
    """
    return results(run).examples(latent)


def folder_of(run: Any) -> Path:
    """Returns the folder that is meant by a path, or by what has one: the result of a run."""
    found = getattr(run, "run_dir", run)
    if not isinstance(found, str | os.PathLike):
        kind = type(run).__name__
        raise TypeError(f"run: {kind} is no run; give its folder, or what sae.train or interp.explain returned")
    return Path(found)
