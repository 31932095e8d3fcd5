"""The training run, top to bottom: text -> tokens -> activations -> coders, evaluated and saved.

A run folder explains itself: config.yaml, env.json, metrics.jsonl (deterministic values only), timings.jsonl (the
clock), checkpoints/step-*/, coders/<site>/ and report.html.
"""

import errno
import logging
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import draccus
import torch

from sae.base.arguments import wrong
from sae.base.errors import Stopped
from sae.base.files import cache_dir
from sae.base.paths import check_writable
from sae.base.progress import Display, Watch
from sae.base.tracker import Tracker
from sae.lm.files import loading_bars
from sae.parallel import agreement, ranks
from sae.parallel.stopping import stop_flag
from sae.training import checkpoint
from sae.training.arguments import as_config, with_activations, with_model
from sae.training.callbacks import Callbacks, Listener
from sae.training.config import TrainConfig
from sae.training.loop import Run, TrainResult
from sae.training.preparing import load_models, set_up, set_up_tensors

if TYPE_CHECKING:
    from sae.lm.models import ModelLike, TokenizerLike

log = logging.getLogger(__name__)


def train(
    config: TrainConfig | dict[str, Any] | Path | str,
    resume: bool = False,
    trust_remote_code: bool = False,
    run_dir: Path | str | None = None,
    repair: bool = False,
    *,
    model: "ModelLike | None" = None,
    tokenizer: "TokenizerLike | None" = None,
    activations: Any = None,
    callbacks: Sequence[Listener] | Listener | None = (),
    progress: Display = True,
) -> TrainResult:
    """Trains, evaluates and saves the coders of a config and returns them with their metrics.

    With `resume`, continues the run folder's newest checkpoint bit for bit (from the start if it has none). With
    `repair`, verifies the caches the run will read and makes again what is damaged. `progress` says how the stages are
    shown: True (a bar in a notebook or on a terminal, else a line every few seconds), False, or a function that is
    given the `Position`. `callbacks` hear of steps, evaluations, checkpoints and the end; a function, of every step.

    The config may be a mapping of its fields, or the path of a YAML file. `model`, a name or one that is loaded, stands
    in place of the one that the config names; the config in the run's folder says its name. A loaded one of no name,
    or whose weights its name does not lead to, is passed again to resume.

    `activations`, of whatever model, take the place of a language model and text: a path as in `activations.path`, a
    tensor [n, width] of the first of `activations.sites`, a dict of tensors by site, a list of either, or an iterator
    of them (docs/tensors.md), which needs `state()` and `load_state()` for the run to be resumed.

    Raises ConfigError for what cannot be, before long work starts; Stopped after a signal, with a checkpoint written;
    what a callback raises, when all that was trained is saved, with a note that says how to go on. After StopTraining
    it returns the coders as they are; the run may still go on with `resume`.
    """
    if not isinstance(resume, bool):
        raise wrong("resume", resume, "True or False; the folder to go on in is run_dir")
    if not isinstance(run_dir, str | os.PathLike | None):
        raise wrong("run_dir", run_dir, "the path of a folder")
    config, told, watch = as_config(config), Callbacks(callbacks), Watch(repair=repair, display=progress)
    config, activations = with_activations(config, activations)
    config.validate()
    with loading_bars(shown=progress is True):
        config, given = with_model(config, model, tokenizer, trust_remote_code)
    folder = Path(run_dir or config.run_dir or Path("runs") / config.name).expanduser()
    config = checkpoint.resumed_config(config, folder) if resume else checkpoint.placed_config(config)
    with (
        torch.inference_mode(False),  # whatever the caller is within
        torch.enable_grad(),
        ranks.process_group(config.ranks),
        stop_flag() as stop,
        checkpoint.locked(folder, resume),
    ):
        check_writable(cache_dir(), "SAE_CACHE")
        with agreement.together():
            name = config.log.tracker if ranks.rank() == 0 else "none"
            tracker = Tracker(name, config.log.project, folder.name, draccus.encode(config))
        watch = replace(watch, should_stop=stop)
        try:
            if config.activations.source == "tensors":
                setting = set_up_tensors(config, folder, resume, activations)
            else:
                with stop.lifted(), loading_bars(shown=progress is True):
                    models = load_models(config, trust_remote_code, given)
                setting = set_up(config, models, folder, resume, watch, trust_remote_code)
            saved = checkpoint.latest(folder) if resume else None
            if resume and saved is None:
                log.info("no checkpoint in %s yet: starting at step 0", folder)
            with closing(Run(setting, saved, watch, stop, told)) as run:
                run.loop(tracker)
                return run.finish()
        except Stopped as stopped:
            raise _in_python(Stopped(f"{stopped}; continue with --resume {folder}")) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = f"{error.strerror}; once there is room, continue with --resume {folder}"
            raise _in_python(OSError(error.errno, reason)) from error
        finally:
            tracker.finish()


def _in_python(error: Exception) -> Exception:
    """Adds to an error what a traceback says and a command does not."""
    error.add_note("In Python, that is sae.train(..., resume=True).")
    return error
