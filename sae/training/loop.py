"""The loop of a run: steps, logs, checkpoints, evaluations, and what it leaves in its folder."""

import json
import logging
import os
import shutil
import time
from collections import ChainMap
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sae import kernels
from sae.base.errors import ConfigError, Stopped
from sae.base.files import append, save_tensors, write_json
from sae.base.progress import Aside, Progress, Watch, during
from sae.base.tracker import Tracker
from sae.coder.coder import SparseCoder
from sae.coder.cutting import retold
from sae.evaluation.evaluation import evaluate_all
from sae.evaluation.tables import Evaluation
from sae.loading import hub
from sae.pages.notebook import text_lines
from sae.parallel import agreement, collectives, ranks, replicas
from sae.parallel.stopping import StopFlag
from sae.stream.batch import ActivationBatch
from sae.stream.carrying import Carrier
from sae.stream.drawn import Ended
from sae.training import restoring
from sae.training.batches import Shares, bad_blocks
from sae.training.callbacks import Callbacks, Moment
from sae.training.hearing import Given, Hearing
from sae.training.preparing import Setting, new_trainers
from sae.training.reporting.report import write_report
from sae.training.saving import Part, Parts, Saver
from sae.training.step import NonFiniteError

log = logging.getLogger(__name__)
MIDWAY = ".evaluated"
"""The folder of coders that are evaluated before they are finished."""


@dataclass(frozen=True, repr=False)
class TrainResult:
    """What a finished run leaves."""

    run_dir: Path
    coders: dict[str, SparseCoder]
    """By name: the site, and the grid point if there is a grid."""
    metrics: dict[str, dict[str, Any]]
    """The final held-out evaluation by coder name."""

    def __repr__(self) -> str:
        return "\n".join(
            [f"TrainResult({str(self.run_dir)!r})", *(f"  {name}: {c}" for name, c in self.coders.items())]
        )

    def _repr_html_(self) -> str:
        return text_lines([str(self.run_dir)]) + Evaluation(self.metrics)._repr_html_()


class Run:
    """The trainers of a run and the stream that they share, at some step."""

    def __init__(self, setting: Setting, saved: Path | None, watch: Watch, stop: StopFlag, told: Callbacks) -> None:
        self.setting, self.config, self.folder, self.stop = setting, setting.config, setting.folder, stop
        self.watch, self.told, self.main = watch, told, ranks.rank() == 0
        self.source = setting.subject.open_source(setting.config, watch)
        replicas.check_machines(setting.subject.device)
        self.trainers = new_trainers(setting, self.source, saved, watch)
        self.stream = setting.subject.open_stream(setting.config, self.source, setting.mesh.lanes)
        self.exchange = setting.exchange()
        self.carrier = Carrier(setting.subject.device)
        self.hearing = Hearing(self.trainers, [plan.name for plan in setting.plans], setting.mesh.sites.moves)
        self.heard_each_step = collectives.any_rank(bool(told.hooks["on_step"]))  # what is heard may move: all or none
        self.bad_steps = 0
        self.saver = Saver(self.folder, setting.config.checkpoints.keep, saved)
        self.ended: Ended | None = None
        self.logs = {name: self.folder / name for name in ("metrics.jsonl", "timings.jsonl")}
        self.step = self._restore(saved)
        every = self.config.checkpoints.every_steps
        if self.step - self.step % every + every < self.config.steps:  # else there is none on the way
            self.saver.make_room(self._state()[0])

    def close(self) -> None:
        """Ends what reads ahead, and what writes in the background."""
        self.stream.close()
        self.saver.close()

    def _restore(self, saved: Path | None) -> int:
        """Loads a checkpoint into the trainers and the stream and cuts the logs back to it; returns its step."""
        if saved is None:
            sizes, step = dict.fromkeys(self.logs, 0), 0
        else:
            stored, values = restoring.load(saved)
            for name, value in self.setting.subject.fingerprint.items():
                then = values["reads"].get(name)
                if then != value:
                    raise ConfigError(
                        f"--resume: the {name} is not that of the run ({then!r} then, {value!r} now); "
                        "bring it back, or start a new run"
                    )
            for name, trainer in self.trainers.items():
                share = trainer.coder.spec.d_sae / trainer.coder.whole.d_sae
                own = restoring.values_of_part(values["coders"][name], trainer.mesh.latents, share)
                trainer.load_state(restoring.Held(stored[self._group(name)], trainer.rows), own)
            self.stream.load_state(dict(stored["stream"]))
            self.bad_steps, sizes, step = values["bad_steps"], values["log_bytes"], values["step"]
            log.info("continuing %s at step %d of %d", self.folder, step, self.config.steps)
        if self.main:
            shutil.rmtree(self.folder / MIDWAY, ignore_errors=True)  # of a run that was killed
            for name, path in self.logs.items():
                path.touch()
                os.truncate(path, min(sizes[name], path.stat().st_size))
        return step

    def _group(self, name: str) -> str:
        """Returns what a coder's files in a checkpoint are called."""
        return f"coder-{[plan.name for plan in self.setting.plans].index(name)}"

    def _log_bytes(self) -> dict[str, int]:
        return {name: path.stat().st_size if path.exists() else 0 for name, path in self.logs.items()}

    @property
    def checkpoint(self) -> Path | None:
        """Returns the newest checkpoint that is whole."""
        return self.saver.newest

    def _save(self, log_bytes: dict[str, int], last: bool = False) -> None:
        """Begins to write a checkpoint of the step and of so much of the logs; the last one is whole afterwards."""
        self._settle()
        self._compare()
        position = self.stream.state()
        collectives.total_(*position.values())
        with during("saving"), agreement.together():
            self.saver.wait()
            before = self.checkpoint
            parts, told = self._state()
            values = {
                "reads": self.setting.subject.fingerprint,
                "bad_steps": self.bad_steps,
                "kernels": kernels.path(),
                "log_bytes": log_bytes,
            }
            more = self.step < self.config.steps and not self.stop() and not self.told.ending
            self.saver.save(self.step, parts | {"stream": Part.of(position)}, values, told, more, training=not last)
            if last or self.told.hooks["on_save"]:
                self.saver.wait()
                if self.main and self.checkpoint != before:
                    self.told.tell("on_save", partial(self._moment, {}))

    def _state(self) -> tuple[Parts, dict[str, dict[str, Any]]]:
        """Returns what the trainers need to go on: (tensors by file, plain values by what they are and by coder).

        The values of a part are told by the first of the ranks that hold it, the spec by that of all parts.
        """
        parts: Parts = {}
        told: dict[str, dict[str, Any]] = {"coders": {}, "specs": {}}
        for name, trainer in self.trainers.items():
            tensors, values = trainer.state()
            parts[self._group(name)] = Part.of(tensors, trainer.mesh, trainer.rows)
            if not trainer.mesh.data.rank:
                told["coders"][name] = values
            if not trainer.mesh.team.rank:
                told["specs"][name] = trainer.coder.whole.to_json()
        return parts, told

    def loop(self, tracker: Tracker) -> None:
        """Trains to the last step, or to the one at which a callback asked for an end, and writes a checkpoint.

        After that, it raises Stopped if a signal asked for an end, or the error of a callback.
        """
        with self.watch.stage("training", self.config.steps, "steps", self.step, self.main) as progress:
            log_bytes = self._train(tracker, progress)
            self._save(log_bytes, last=True)
            self._check_callbacks("a checkpoint of it is written: continue with resume=True")
            at, most = f"at step {self.step} of {self.config.steps}", self.step * self.config.batch_tokens
            if self.ended:
                on = "or go on from its checkpoint with an iterator that does"
                raise ConfigError(f"{self.ended}, {at}; set tokens to {most} at the most, {on}")
            if self.step < self.config.steps and collectives.any_rank(self.stop()):
                raise agreement.known(Stopped(f"{at}, checkpoint written"))

    def _train(self, tracker: Tracker, progress: Progress) -> dict[str, int]:
        """Returns the lengths of the logs that belong to the step it has come to."""
        config, steps, began, first = self.config, self.config.steps, time.monotonic(), self.step
        shown: dict[str, float] = {}
        while self.step < steps and not self._ending():
            log_bytes = self._log_bytes()
            if config.eval.every_steps and self.step and self.step % config.eval.every_steps == 0:
                try:  # the checkpoint of this step knows nothing of it, so that a resume does it again
                    self._evaluate_midway()
                except Stopped:
                    return log_bytes
                if self._ending():
                    return log_bytes
            try:
                batch = next(self.stream)
            except Ended as ended:
                self.ended = ended
                return log_bytes
            self._train_on(batch)
            self.step += 1
            step = self.step
            logs = step % config.log.every_steps == 0 or step == steps
            lines = self._settle() if logs or step == first + 1 or self.heard_each_step else []
            if step == first + 1:  # rather than at the first checkpoint, which may be far
                self._compare()
            if lines and logs:
                self._write("metrics.jsonl", *lines)
                seconds = time.monotonic() - began
                rate = (step - first) * config.batch_tokens / seconds
                self._write(
                    "timings.jsonl", {"step": step, "seconds": round(seconds, 3), "tokens_per_s": round(rate, 1)}
                )
                for line in lines:
                    tracker.log({f"{line['coder']}/{k}": v for k, v in line.items() if isinstance(v, float)}, step)
                head = lines[0]
                late = rate if progress.pace.rate is None else progress.pace.rate * config.batch_tokens
                shown = {"fvu": head["fvu"], "l0": head["l0"], "dead": head["dead_share"], "tokens_per_s": late}
            progress.update(step, 0, **shown)
            self.told.tell("on_step", partial(self._moment, _figures(lines)))
            if step % config.checkpoints.every_steps == 0 and step < steps:
                self._save(self._log_bytes())
        return self._log_bytes()

    def _ending(self) -> bool:
        """Returns whether any rank was asked for an end, or lost a checkpoint; all must call it at the same step.

        What went wrong with a coder that other ranks train is heard on the way.
        """
        ending = self.stop() or self.told.ending or self.saver.failed
        if not self.hearing.several:
            return collectives.any_rank(ending)
        ending, wrong = collectives.any_rank_each(ending, self.hearing.wrong)
        self._skip(self.hearing.told(wrong))
        return ending

    def _check_callbacks(self, kept: str) -> None:
        """Raises what a callback has raised; on the other ranks, that this one failed."""
        error = self.told.failure
        if error is not None:
            error.add_note(f"raised by the callback {self.told.failed} at step {self.step}; {kept}")
        if collectives.any_rank(error is not None):
            raise agreement.known(error or agreement.PeerError(1))

    def _moment(self, metrics: dict[str, Any], coders: dict[str, SparseCoder] | None = None) -> Moment:
        """Returns what callbacks are told now, about the coders as they stand or the finished ones."""

        def snapshot() -> dict[str, SparseCoder]:
            if coders is None and self.setting.mesh.cuts:
                raise RuntimeError("moment.coders: no rank has them whole; ask for them in on_evaluate or on_end")
            return deepcopy(coders) if coders else self._trained()

        step, steps, tokens = self.step, self.config.steps, self.step * self.config.batch_tokens
        return Moment(step, steps, tokens, deepcopy(metrics), self.folder, self.checkpoint, snapshot)

    def _compare(self) -> None:
        """Raises ReplicaError if ranks that hold the same rows of a coder have come to differ in them."""
        held = {
            f"{name} {key}{rows.told() if (rows := trainer.rows(key, value)) else ''}": value
            for name, trainer in self.trainers.items()
            for key, value in trainer.replicated().items()
        }
        replicas.check_alike(held, f"after step {self.step}")

    def _train_on(self, batch: ActivationBatch) -> None:
        """Gives one batch to every coder, and hears of the batch before: the host waits for no step it has just given.

        All that is written or told of a step is behind `_settle`.
        """
        shares = Shares(self.exchange(batch), self.setting, self.carrier)
        figures = {
            plan.name: self.trainers[plan.name].step(shares.of(plan, self.trainers[plan.name].coder), self.step)
            for plan in self.setting.own
        }
        self._skip(self.hearing.give(Given(batch, self.step + 1, figures)))

    def _settle(self) -> list[dict[str, Any]]:
        """Hears of all steps; returns the metrics of the coders that took the last one, if it was still on its way."""
        wrong, lines = self.hearing.settle()
        self._skip(wrong)
        return lines

    def _skip(self, wrong: list[Given]) -> None:
        """Keeps the batches of steps for inspection; goes on while `max_bad_steps` allows."""
        for given in wrong:
            self.bad_steps += 1
            dump = self.folder / f"bad-batch-step-{given.step}-rank-{ranks.rank()}.safetensors"
            save_tensors(dump, {**given.batch.activations, "blocks": given.batch.blocks})
            blocks = bad_blocks(given.batch)
            of = f" ({self.source.told(blocks)})" if blocks else ""
            errors = self.hearing.described(given)
            where = f"step {given.step}, {errors}; the step was not applied, its batch{of} is in {dump}"
            if self.bad_steps > self.config.max_bad_steps:
                raise NonFiniteError(f"{where} (max_bad_steps: {self.config.max_bad_steps})")
            log.warning("%s; skipped (%d of %d allowed)", where, self.bad_steps, self.config.max_bad_steps)

    def _trained(self) -> dict[str, SparseCoder]:
        """Returns what this rank has of the finished coders, as they would be now."""
        return {name: trainer.trained() for name, trainer in self.trainers.items()}

    def _saved(self, own: dict[str, SparseCoder], folder: Path) -> dict[str, SparseCoder]:
        """Saves the coders by name in a folder, of which this rank has some or parts, and returns all of them.

        Those that it has not whole are read from there when they are looked at.
        """
        hub.save_together({folder / name: coder for name, coder in own.items()}, self.setting.mesh)
        if not self.setting.mesh.cuts:
            return own
        device = self.setting.subject.device
        with agreement.together():
            paths = {plan.name: folder / plan.name for plan in self.setting.plans}
            if device.type == "cpu":
                return {name: hub.load(path, lazy=True) for name, path in paths.items()}
            return {name: hub.load(path, device, device_map="disk") for name, path in paths.items()}

    def _evaluate(self, coders: dict[str, SparseCoder]) -> dict[str, dict[str, Any]]:
        """Returns the held-out figures, to which every rank has measured its share; all must call it."""
        on, tokens = self.setting.subject.measured_on, self.config.eval.tokens
        return evaluate_all(coders, self.watch, tokens, share=ranks.own_share(), **on)

    def _evaluate_midway(self) -> None:
        """Writes a held-out evaluation to metrics.jsonl; coders that no rank has whole lie in a folder meanwhile."""
        folder = self.folder / MIDWAY
        coders = self._saved(self._trained(), folder) if self.setting.mesh.cuts else self._trained()
        found = self._evaluate(coders)
        with agreement.together():
            if self.main:
                lines = [{"step": self.step, "coder": name, "held_out": found[name]} for name in found]
                self._write("metrics.jsonl", *lines)
                self.told.tell("on_evaluate", partial(self._moment, found, coders))
                shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> TrainResult:
        """Saves and evaluates the coders."""
        self.stream.close()
        own = self._trained()
        if self.step < self.config.steps:  # a callback has ended it
            tokens = self.step * self.config.batch_tokens
            for coder in own.values():
                retold(coder, training={**coder.whole.training, "tokens": tokens})
        coders = self._saved(own, self.folder / "coders")  # before anything else can fail
        found = self._evaluate(coders)
        active = {name: trainer.active_steps for name, trainer in self.trainers.items()}
        active = agreement.concluded(active, lambda every: dict(ChainMap(*every)))
        for name, coder in coders.items():
            found[name]["training"] = {"active_steps": active[name], "steps": self.step}
            coder.spec = coder.spec.with_(metrics=found[name])
        with agreement.together():
            if self.main:
                for name, coder in coders.items():
                    hub.describe(self.folder / "coders" / name, coder.spec)
                write_json(self.folder / "evaluation.json", found)
                with Aside("report.html", "all figures are in evaluation.json"):
                    write_report(self.folder)
                self.told.tell("on_evaluate", partial(self._moment, found, coders))
                self.told.tell("on_end", partial(self._moment, found, coders))
        self._check_callbacks(f"the run is finished, and all is saved in {self.folder}")
        return TrainResult(self.folder, coders, found)

    def _write(self, name: str, *lines: dict[str, Any]) -> None:
        if self.main:
            append(self.folder / name, "".join(json.dumps(line) + "\n" for line in lines))


def _figures(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns what a step has measured, by coder."""
    return {
        line["coder"]: {key: value for key, value in line.items() if key not in ("step", "coder")} for line in lines
    }
