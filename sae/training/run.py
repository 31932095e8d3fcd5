"""The training run, top to bottom: text -> tokens -> activations -> coders, evaluated and saved.

A run folder explains itself: config.yaml, env.json, metrics.jsonl (deterministic values only), timings.jsonl (the
clock), checkpoints/step-*/, coders/<site>/ and report.html.
"""

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import draccus
import torch

from sae.base.arguments import wrong
from sae.base.errors import Stopped
from sae.base.files import cache_dir
from sae.base.paths import check_writable
from sae.base.progress import Display, Watch, during
from sae.base.tracker import Tracker
from sae.lm.files import loading_bars
from sae.parallel import agreement, ranks
from sae.parallel.mesh import made
from sae.parallel.stopping import stop_flag
from sae.training import checkpoint
from sae.training.arguments import as_config, with_activations, with_model
from sae.training.callbacks import Callbacks, Listener
from sae.training.config import TrainConfig
from sae.training.loop import Run, TrainResult
from sae.training.preparing import load_models, set_up, set_up_tensors
from sae.training.shaping import mesh_of_run
from sae.training.start import AUTO, begin, check_shared, mark
from sae.training.subject import check_store

if TYPE_CHECKING:
    from sae.lm.models import ModelLike, TokenizerLike

log = logging.getLogger(__name__)


def train(
    config: TrainConfig | dict[str, Any] | Path | str,
    resume: bool | str = False,
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

    With `resume`, continues the run folder's newest checkpoint bit for bit (from the start if it has none); "auto" does
    so if there is a run in the folder that is named or, if none is, one that this very job has begun (docs/cluster.md).
    With `repair`, verifies the caches the run will read and makes again what is damaged. `progress` says how the stages
    are shown: True (a bar in a notebook or on a terminal, else a line now and then), False, or a function that is
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
    if not isinstance(resume, bool) and not (isinstance(resume, str) and resume == AUTO):
        raise wrong("resume", resume, f"True, False or {AUTO!r}; the folder to go on in is run_dir")
    if not isinstance(run_dir, str | os.PathLike | None):
        raise wrong("run_dir", run_dir, "the path of a folder")
    config, told, watch = as_config(config), Callbacks(callbacks), Watch(repair=repair, display=progress)
    config, activations = with_activations(config, activations)
    config.validate()
    with loading_bars(shown=progress is True):
        config, given = with_model(config, model, tokenizer, trust_remote_code)
    asked = config
    with (
        torch.inference_mode(False),  # whatever the caller is within
        torch.enable_grad(),
        stop_flag() as stop,
        ranks.process_group(config.ranks),
    ):
        config, folder, going_on = begin(lambda: asked, Path(run_dir) if run_dir else None, resume)
        with checkpoint.locked(folder, going_on), _ended_well(folder):
            check_shared(folder)
            check_writable(cache_dir(), "SAE_CACHE")
            passed = given is not None or activations is not None
            shape, reason = mesh_of_run(config, ranks.world_size(), trust_remote_code, passed)
            mesh = made(shape)
            if mesh.cuts or reason:
                log.info("mesh         %s%s", shape, f": {reason}" if reason else "")
            with agreement.together():
                name = config.log.tracker if ranks.rank() == 0 else "none"
                tracker = Tracker(name, config.log.project, folder.name, draccus.encode(config))
            watch = replace(watch, should_stop=stop)
            try:
                if config.activations.source == "tensors":
                    setting = set_up_tensors(config, folder, going_on, mesh, activations)
                else:
                    check_store(config)
                    with stop.lifted(), loading_bars(shown=progress is True), during("loading the model"):
                        models = load_models(config, trust_remote_code, given)
                    setting = set_up(config, models, folder, going_on, watch, trust_remote_code, mesh)
                with closing(Run(setting, _newest(folder, going_on), watch, stop, told)) as run:
                    run.loop(tracker)
                    return run.finish()
            finally:
                tracker.finish()


def _newest(folder: Path, resume: bool) -> Path | None:
    """Returns the checkpoint to go on from, which rank 0 finds and verifies."""
    if not resume:
        return None
    found = agreement.agreed(lambda: getattr(checkpoint.latest(folder), "name", None))
    if found is None:
        log.info("no checkpoint in %s yet: starting at step 0", folder)
    return folder / "checkpoints" / found if found else None


@contextmanager
def _ended_well(folder: Path) -> Iterator[None]:
    """Says of an end that can be gone on from how to do so, and leaves word of it in the run's folder."""
    mark(folder, stopped=False)
    try:
        yield
    except Stopped as stopped:
        mark(folder, stopped=True)
        raise _in_python(Stopped(f"{stopped}; continue with --resume {folder}")) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = f"{error.strerror}; once there is room, continue with --resume {folder}"
        raise _in_python(OSError(error.errno, reason)) from error


def _in_python(error: Exception) -> Exception:
    """Adds to an error what a traceback says and a command does not."""
    error.add_note("In Python, that is sae.train(..., resume=True).")
    return error
