"""The training run, top to bottom: text -> tokens -> activations -> coders, evaluated and saved.

A run folder explains itself: config.yaml, env.json, metrics.jsonl (deterministic values only), timings.jsonl (the
clock), checkpoints/step-*/, coders/<site>/ and report.html.
"""

import json
import logging
import os
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import draccus
import torch
from torch import Tensor

from sae.base.errors import ConfigError, Stopped
from sae.base.files import append, atomic_write, cache_dir, check_writable, save_tensors, write_json
from sae.base.progress import Progress, Tracker, Watch
from sae.base.settings import decode, read_yaml, to_yaml
from sae.base.store import fingerprint_key, repair
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.evaluation.evaluation import evaluate
from sae.lm.environment import environment
from sae.lm.hooks import of_model, widths
from sae.lm.masking import MaskSpec, norm_mask
from sae.lm.models import DTYPES, LanguageModel, ModelConfig, load_language_model
from sae.lm.site import SECOND, Site
from sae.loading import hub
from sae.parallel import collectives
from sae.parallel.stopping import StopFlag, stop_flag
from sae.stream.batch import ActivationBatch
from sae.stream.lanes import Stream, lanes_of
from sae.stream.rows import RowStream
from sae.stream.sources import Blocks, CachedSource, LiveSource, Source
from sae.text.documents import commit_of_data, documents
from sae.text.tokenizing import TokenizedText, special_ids, tokenize
from sae.training import checkpoint
from sae.training.config import TrainConfig
from sae.training.end_to_end import splicer
from sae.training.measuring import Statistics, measure, sample
from sae.training.planning import Planned, paired, planned
from sae.training.report import write_report
from sae.training.trainer import Batch, CoderTrainer, NonFiniteError, Schedule, new_coder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves."""

    run_dir: Path
    coders: dict[str, SparseCoder]
    """By name: the site, and the grid point if there is a grid."""
    metrics: dict[str, dict[str, Any]]
    """The final held-out evaluation by coder name."""


def train(
    config: TrainConfig,
    resume: bool = False,
    trust_remote_code: bool = False,
    run_dir: Path | None = None,
    repair: bool = False,
) -> TrainResult:
    """Trains, evaluates and saves the coders of a config and returns them with their metrics.

    With `resume`, continues the run folder's newest checkpoint bit for bit (from the start if it has none). With
    `repair`, verifies the caches the run will read and makes again what is damaged. Raises ConfigError for what cannot
    be, before long work starts; Stopped after a signal, with a checkpoint written.
    """
    config.validate()
    folder = Path(run_dir or config.run_dir or Path("runs") / config.name).expanduser()
    if resume:
        config = checkpoint.resumed(config, folder)
    with collectives.process_group(), stop_flag() as stop, checkpoint.locked(folder, resume):
        check_writable(cache_dir(), "SAE_CACHE")
        name = config.log.tracker if collectives.rank() == 0 else "none"
        tracker = Tracker(name, config.log.project, folder.name, draccus.encode(config))
        run = Run(config, folder, stop, trust_remote_code, repair)
        try:
            return run.train(tracker, resume)
        except Stopped as stopped:
            raise Stopped(f"{stopped}; continue with --resume {folder}") from None
        finally:
            run.stream.close() if run.stream else None
            tracker.finish()


class Run:
    """One run's parts, built in the order in which data flows."""

    def __init__(
        self, config: TrainConfig, folder: Path, stop: StopFlag, trust_remote_code: bool, repair: bool
    ) -> None:
        self.config, self.folder, self.stop, self.repair = config, folder, stop, repair
        self.main = collectives.rank() == 0
        self.stream: Stream | RowStream | None = None
        self.bad_steps = 0
        self.micro_tokens = -(-config.micro_batch_tokens // collectives.world_size())  # of this rank
        lanes_of(collectives.rank(), collectives.world_size())  # refused here rather than when the stream begins
        if Path(config.text.source).expanduser().exists():
            next(documents(config.text))  # a missing column is known before the model is loaded
        self.trust_remote_code = trust_remote_code
        self.lm = self._load(config.model)
        self.second = self._load(config.second_model) if config.second_model.name else None
        if self.second and self.second.tokenizer.get_vocab() != self.lm.tokenizer.get_vocab():
            raise ConfigError(f"second_model.name: {self.second.name} has another tokenizer than {self.lm.name}")
        pairs = paired(config, self.lm, self.second)
        self.sites = list({site.name: site for pair in pairs for site in pair}.values())
        found = widths(self.lm, of_model(self.sites, ""))
        if self.second:
            found |= widths(self.second, of_model(self.sites, SECOND))
        self.planned = planned(config, pairs, found)

    def _load(self, model: ModelConfig) -> LanguageModel:
        return load_language_model(model.name, model.revision, model.dtype, model.device, self.trust_remote_code)

    def train(self, tracker: Tracker, resume: bool) -> TrainResult:
        """Runs all stages; see `train`."""
        if not resume:
            with collectives.together():
                if self.main:  # from here on the run can be resumed, if only from its start
                    atomic_write(self.folder / "config.yaml", to_yaml(_pinned(self.config, self.lm)))
                    write_json(self.folder / "env.json", environment(self.lm, trust_remote_code=self.trust_remote_code))
            self.config = decode(TrainConfig, read_yaml(self.folder / "config.yaml"))
        config = self.config
        text = self._text()
        self.reads = {**self.lm.fingerprint(), "text": text.key}
        if self.second:
            self.reads |= {f"{SECOND} {name}": value for name, value in self.second.fingerprint().items()}
        saved = checkpoint.latest(self.folder) if resume else None
        if resume and saved is None:
            log.info("no checkpoint in %s yet: starting at step 0", self.folder)
        special = tuple(sorted(special_ids(self.lm.tokenizer)))
        mask = MaskSpec(special, config.activations.skip_positions, next_token=config.gradient_loss is not None)
        source = self._source(text, mask)
        with collectives.together():
            trainers = self._trainers(source, text, mask, saved)
        ahead = config.activations.blocks_ahead(on_cpu=self.lm.device.type == "cpu")
        ranks = collectives.rank(), collectives.world_size()
        if config.needs_rows:
            dtype = config.activations.dtype
            self.stream = RowStream(
                self.lm, text.train, self.sites, mask, config.batch_tokens, config.seed, dtype, *ranks
            )
        else:
            self.stream = Stream(source, config.batch_tokens, config.seed, ahead, *ranks)
        step = self._restore(saved, trainers)
        self._loop(step, trainers, text, tracker)
        return self._finish(trainers, text)

    def _text(self) -> TokenizedText:
        progress = Progress("tokenizing", None, "tokens", visible=self.main)
        with collectives.rank_zero_first():
            text = tokenize(
                self.config.text,
                self.lm.tokenizer,
                self.lm.source(),
                Watch(self.stop, progress.update, self.repair),
            )
        progress.close()
        n_tokens = text.train.n_rows * text.train.context_length
        log.info(
            "text: %s train tokens in rows of %d, %s held out; %.1f epochs planned",
            f"{n_tokens:,}",
            text.train.context_length,
            f"{text.held_out.n_rows * text.held_out.context_length:,}",
            self.config.tokens / n_tokens,
        )
        return text

    def _source(self, text: TokenizedText, mask: MaskSpec) -> Source:
        settings = self.config.activations
        blocks = Blocks(text.train, settings.block_rows, self.config.seed)
        loss = self.config.gradient_loss
        live = LiveSource(self.lm, blocks, self.sites, mask, settings.dtype, loss, self.second)
        if settings.source == "live":
            return live
        fingerprint = {
            **self.reads,
            "sites": [site.name for site in self.sites],
            "block_rows": settings.block_rows,
            "seed": self.config.seed,
            "kept_as": settings.dtype,
            "gradients": self.config.gradient_loss,
            "special_ids": list(mask.special_ids),
            "skip_positions": mask.skip_positions,
        }
        folder = cache_dir() / "activations" / fingerprint_key(fingerprint)
        if self.repair:
            with collectives.together():
                if self.main:
                    repair(folder, "activations", fingerprint)
        source = CachedSource(live, folder, fingerprint, part=str(collectives.rank()))
        if settings.source == "disk":
            progress = Progress("storing activations", len(source), "blocks", visible=self.main)
            mine = range(collectives.rank(), len(source), collectives.world_size())
            with collectives.together():
                source.fill(mine, Watch(self.stop, progress.update))
            progress.close()
            source.reload()
        return source

    def _trainers(
        self, source: Source, text: TokenizedText, mask: MaskSpec, saved: Path | None
    ) -> dict[str, CoderTrainer]:
        config, trainers = self.config, {}
        schedule = Schedule(config.steps, config.dead_after, self.micro_tokens, DTYPES[config.precision])
        specs = json.loads((saved / checkpoint.STATE).read_text())["specs"] if saved else {}
        samples = {} if saved else sample(source, config.activations.statistics_tokens, Watch(self.stop))
        measured: dict[tuple[Any, ...], Statistics] = {}
        for plan in self.planned:
            if saved:
                coder = SparseCoder(CoderSpec.from_json(specs[plan.name]), self.lm.device)
            else:
                start = plan.coder.start_from
                like = hub.load(start).spec if start else None
                settings = plan.coder.normalization, plan.coder.center, plan.coder.balance_sites, like
                key = (plan.reads, plan.writes, *settings[:-1], start)
                if key not in measured:
                    norm_filter = config.activations.norm_filter
                    measured[key] = measure(samples, plan.reads, plan.writes, mask, norm_filter, *settings)
                coder = new_coder(
                    plan.coder,
                    measured[key],
                    self.lm.device,
                    context_length=text.train.context_length,
                    bos=config.text.bos,
                    training={
                        "text": draccus.encode(config.text),
                        "tokens": config.steps * config.batch_tokens,
                        "seed": plan.coder.seed,
                        "sae-interp": version("sae-interp"),
                    },
                )
            trainers[plan.name] = CoderTrainer(coder, plan.coder.objectives, plan.optim, schedule)
        for found in dict.fromkeys(map(str, measured.values())):
            log.info("%s", found)
        return trainers

    def _restore(self, saved: Path | None, trainers: dict[str, CoderTrainer]) -> int:
        """Loads a checkpoint into the trainers and the stream and cuts the logs back to it; returns its step."""
        logs = {name: self.folder / name for name in ("metrics.jsonl", "timings.jsonl")}
        if saved is None:
            sizes, step = dict.fromkeys(logs, 0), 0
        else:
            tensors, values = checkpoint.load(saved)
            for name, value in self.reads.items():
                then = values["reads"].get(name)
                if then != value:
                    raise ConfigError(
                        f"--resume: the {name} is not that of the run ({then!r} then, {value!r} now); "
                        "bring it back, or start a new run"
                    )
            for i, (name, trainer) in enumerate(trainers.items()):
                trainer.load_state(tensors[f"coder-{i}"], values["coders"][name])
            self.stream.load_state(tensors["stream"])  # type: ignore[union-attr]
            self.bad_steps, sizes, step = values["bad_steps"], values["log_bytes"], values["step"]
            log.info("continuing %s at step %d of %d", self.folder, step, self.config.steps)
        if self.main:
            for name, path in logs.items():
                path.touch()
                os.truncate(path, min(sizes[name], path.stat().st_size))
        return step

    def _save(self, step: int, trainers: dict[str, CoderTrainer]) -> None:
        position = self.stream.state()  # type: ignore[union-attr]
        collectives.total_(*position.values())
        with collectives.together():
            if not self.main:
                return
            states = {name: trainer.state() for name, trainer in trainers.items()}
            tensors = {f"coder-{i}": state[0] for i, state in enumerate(states.values())}
            values = {
                "coders": {name: state[1] for name, state in states.items()},
                "specs": {name: trainer.coder.spec.to_json() for name, trainer in trainers.items()},
                "reads": self.reads,
                "bad_steps": self.bad_steps,
                "log_bytes": {n: (self.folder / n).stat().st_size for n in ("metrics.jsonl", "timings.jsonl")},
            }
            checkpoint.save(self.folder, step, {**tensors, "stream": position}, values, self.config.checkpoints.keep)

    def _loop(self, step: int, trainers: dict[str, CoderTrainer], text: TokenizedText, tracker: Tracker) -> None:
        config, steps, began, first = self.config, self.config.steps, time.monotonic(), step
        progress = Progress("training", steps, "steps", start=step, visible=self.main)
        while step < steps and not self.stop.anywhere():
            if config.eval.every_steps and step and step % config.eval.every_steps == 0:
                try:  # the checkpoint of this step knows nothing of it, so that a resume does it again
                    self._evaluate_midway(step, trainers, text)
                except Stopped:
                    break
            lines = self._step(next(self.stream), step, trainers)  # type: ignore[arg-type]
            step += 1
            if lines and (step % config.log.every_steps == 0 or step == steps):
                self._write("metrics.jsonl", *lines)
                seconds = time.monotonic() - began
                rate = (step - first) * config.batch_tokens / seconds
                self._write(
                    "timings.jsonl", {"step": step, "seconds": round(seconds, 3), "tokens_per_s": round(rate, 1)}
                )
                for line in lines:
                    tracker.log({f"{line['coder']}/{k}": v for k, v in line.items() if isinstance(v, float)}, step)
                head = lines[0]
                progress.update(step, fvu=head["fvu"], dead=head["dead_share"], tokens_per_s=rate)
            if step % config.checkpoints.every_steps == 0 and step < steps:
                self._save(step, trainers)
        progress.close()
        self._save(step, trainers)
        if step < steps:
            raise Stopped(f"at step {step} of {steps}, checkpoint written")

    def _step(self, batch: ActivationBatch, step: int, trainers: dict[str, CoderTrainer]) -> list[dict[str, Any]]:
        """Trains every coder on one batch; returns the metrics of those that took the step."""
        lines, errors = [], []
        for plan in self.planned:
            trainer = trainers[plan.name]
            try:
                metrics = trainer.step(self._batch(batch, plan, trainer.coder), step)
            except NonFiniteError as error:
                errors.append(f"coder {plan.name}: {error}")
            else:
                lines.append({"step": step + 1, "coder": plan.name, **metrics, **_active(trainer)})
        if errors:
            self._bad("; ".join(errors), batch, step)
        return lines

    def _batch(self, batch: ActivationBatch, plan: Planned, coder: SparseCoder) -> Batch:
        """Returns a coder's share of what was streamed: its sites side by side, without outliers."""
        usual = norm_mask({name: batch.activations[name] for name in plan.sites}, coder.spec.mask)
        device = coder.W_enc.device

        def columns(tensors: dict[str, Tensor], sites: tuple[Site, ...]) -> Tensor:
            parts = [tensors[site.name].to(device).float() for site in sites]
            return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[usual.to(device)]

        x = columns(batch.activations, plan.reads)
        target = x if coder.spec.is_autoencoder else columns(batch.activations, plan.writes)
        if batch.text is not None:
            context = batch.text.tokens.shape[1]
            rows = max(1, self.micro_tokens // context) if self.micro_tokens else len(batch.text.tokens)
            return Batch(x, target, None, *splicer(self.lm, batch.text, usual, coder.spec.writes, rows))
        gradients = columns(batch.gradients, plan.writes) if coder.spec.selection.gradient_loss else None
        return Batch(x, target, gradients)

    def _bad(self, errors: str, batch: ActivationBatch, step: int) -> None:
        """Keeps the batch for inspection; goes on while `max_bad_steps` allows."""
        self.bad_steps += 1
        dump = self.folder / f"bad-batch-step-{step + 1}-rank-{collectives.rank()}.safetensors"
        save_tensors(dump, {**batch.activations, "blocks": batch.blocks})
        bad = torch.stack([~torch.isfinite(x).all(1).cpu() for x in batch.activations.values()]).any(0)
        blocks = batch.blocks[bad].unique().tolist()
        of = f" (blocks {', '.join(map(str, blocks))})" if blocks else ""
        where = f"step {step + 1}, {errors}; the step was not applied, its batch{of} is in {dump}"
        if self.bad_steps > self.config.max_bad_steps:
            raise NonFiniteError(f"{where} (max_bad_steps: {self.config.max_bad_steps})")
        log.warning("%s; skipped (%d of %d allowed)", where, self.bad_steps, self.config.max_bad_steps)

    def _evaluate_midway(self, step: int, trainers: dict[str, CoderTrainer], text: TokenizedText) -> None:
        """Writes a held-out evaluation to metrics.jsonl."""
        with collectives.together():
            if self.main:
                coders = {name: trainer.trained() for name, trainer in trainers.items()}
                found = evaluate(coders, self.lm, text.held_out, self.config.eval.tokens, False, self.stop, self.second)
                lines = [{"step": step, "coder": name, "held_out": found[name]} for name in found]
                self._write("metrics.jsonl", *lines)

    def _finish(self, trainers: dict[str, CoderTrainer], text: TokenizedText) -> TrainResult:
        self.stream.close()  # type: ignore[union-attr]
        coders = {name: trainer.trained() for name, trainer in trainers.items()}
        found: dict[str, dict[str, Any]] = {}
        with collectives.together():
            if not self.main:
                return TrainResult(self.folder, coders, found)
            for name, coder in coders.items():  # saved before anything else can fail
                hub.save(coder, self.folder / "coders" / name)
            log.info("evaluating on %s held-out tokens", f"{self.config.eval.tokens:,}")
            found = evaluate(coders, self.lm, text.held_out, self.config.eval.tokens, False, self.stop, self.second)
            for name, coder in coders.items():
                found[name]["training"] = {"active_steps": trainers[name].active_steps, "steps": self.config.steps}
                coder.spec = coder.spec.with_(metrics=found[name])
                hub.save(coder, self.folder / "coders" / name)
            write_json(self.folder / "evaluation.json", found)
            write_report(self.folder, found)
        return TrainResult(self.folder, coders, found)

    def _write(self, name: str, *lines: dict[str, Any]) -> None:
        if self.main:
            append(self.folder / name, "".join(json.dumps(line) + "\n" for line in lines))


def _pinned(config: TrainConfig, lm: LanguageModel) -> TrainConfig:
    """Returns the config with what would else be found anew at every start: commits, and how much text is wanted."""
    text = replace(config.text, revision=commit_of_data(config.text), max_tokens=config.max_text_tokens)
    return replace(config, model=replace(config.model, revision=lm.revision), text=text)


def _active(trainer: CoderTrainer) -> dict[str, int]:
    return {f"active_steps.{name}": count for name, count in trainer.active_steps.items() if name != "reconstruction"}
