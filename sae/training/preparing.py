"""What a run stands on before its first step: models, plans, text, activations, and coders as they begin."""

import logging
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import draccus
import torch

from sae import kernels
from sae.base.errors import ConfigError
from sae.base.files import atomic_write, read_json, write_json
from sae.base.progress import Watch
from sae.base.settings import decode, to_yaml
from sae.coder.cutting import empty_part
from sae.coder.spec import CoderSpec
from sae.lm.devices import resolve_device
from sae.lm.environment import environment
from sae.lm.hooks import sites_of_model
from sae.lm.masking import MaskSpec
from sae.lm.models import DTYPES, LanguageModel, ModelConfig, load_language_model
from sae.lm.site import SECOND, Site
from sae.loading import hub
from sae.parallel import agreement, ranks, replicas
from sae.parallel.mesh import Mesh
from sae.stream.drawn import is_iterator
from sae.stream.exchange import Exchange
from sae.stream.sources import Reading, Source
from sae.stream.tensors import Stored, given_activations
from sae.text.documents import commit_of_data, first_look
from sae.text.tokenizing import TokenizedText, special_ids, tokenize, what_was_met
from sae.training import checkpoint
from sae.training.beginning import Begun, new_part
from sae.training.config import TrainConfig
from sae.training.dealing import dealt, units, wanted
from sae.training.estimate import check_disk, disk_needed
from sae.training.measuring import Recipe, Statistics, measure, sample_activations
from sae.training.planning import CoderPlan, plan_run, plan_tensors, with_model_named
from sae.training.start import own_jobs
from sae.training.subject import OfText, Subject, drawn_from, of_iterator, of_tensors
from sae.training.trainer import CoderTrainer, Schedule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What a run works on: the same at each of its steps, and whenever it goes on."""

    config: TrainConfig
    """As it stands in the folder's config.yaml."""
    folder: Path
    plans: list[CoderPlan]
    subject: Subject
    mesh: Mesh
    groups: list[int]
    """Of every plan, the place along sites of the ranks that train it."""

    @property
    def own(self) -> list[CoderPlan]:
        """Returns the plans of the coders that this rank trains."""
        return [plan for plan, group in zip(self.plans, self.groups, strict=True) if group == self.mesh.sites.rank]

    def exchange(self) -> Exchange:
        """Returns what brings every rank the rows that its coders are trained on."""
        return Exchange(self.mesh, wanted(self.plans, self.groups, self.mesh.shape.sites), *units(self.config))

    @property
    def micro_tokens(self) -> int:
        """Returns how many tokens of a micro-batch are this rank's."""
        return -(-self.config.micro_batch_tokens // self.mesh.data.world_size)


Models = tuple[LanguageModel, LanguageModel | None]


def load_models(config: TrainConfig, trust_remote_code: bool, given: LanguageModel | None = None) -> Models:
    """Returns the language models that a run reads, the first as it is given; of a crosscoder of two, both."""
    if Path(config.text.source).expanduser().exists():
        first_look(config.text)  # a missing column, or damage, is known before the model is loaded

    def load(model: ModelConfig) -> LanguageModel:
        return load_language_model(**vars(model), trust_remote_code=trust_remote_code)

    lm, second = given or load(config.model), load(config.second_model) if config.second_model.name else None
    if second and second.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise ConfigError(f"second_model.name: {second.name} has another tokenizer than {lm.name}")
    return lm, second


def set_up(
    config: TrainConfig, models: Models, folder: Path, resume: bool, watch: Watch, trust_remote_code: bool, mesh: Mesh
) -> Setting:
    """Returns what a run works on; of a new run, config.yaml and env.json are written as soon as all of it can be."""
    lm, second = models
    sites, widths, plans = plan_run(config, lm, second)
    read = [(model, sites_of_model(sites, tag)) for model, tag in ((lm, ""), (second, SECOND)) if model]
    groups = dealt(config, read, plans, mesh.shape)
    about = {"model": lm.fingerprint(), "trust_remote_code": trust_remote_code}
    about = environment(lm.device, **about)
    config = _begun(config, pinned(config, lm), folder, resume, plans, widths, lm.device, about)
    return Setting(config, folder, plans, of_text(config, models, sites, watch), mesh, groups)


def of_text(config: TrainConfig, models: Models, sites: list[Site], watch: Watch) -> OfText:
    """Returns some sites of models over the text of a config, whose commits and amounts are those that were found."""
    lm, second = models
    text = _text(config, lm, watch)
    fingerprint = {**lm.fingerprint(), "text": text.key}
    if second:
        fingerprint |= {f"{SECOND} {name}": value for name, value in second.fingerprint().items()}
    settings, loss = config.activations, config.gradient_loss
    mask = MaskSpec(tuple(sorted(special_ids(lm.tokenizer))), settings.skip_positions, next_token=loss is not None)
    return OfText(Reading(lm, sites, mask, settings.dtype, loss, second), text, fingerprint, config)


def set_up_tensors(config: TrainConfig, folder: Path, resume: bool, mesh: Mesh, activations: Any = None) -> Setting:
    """Returns the same of a run on stored activations, those given or else those that the config names."""
    device, name = resolve_device(config.model.device), config.activations.sites[0]
    drawn = drawn_from(config, activations) if is_iterator(activations) else None
    if drawn:
        stored = Stored("the iterator", [drawn.like])
    else:
        given = config.activations.path if activations is None else activations
        stored = given_activations(given, name)
    stored = with_model_named(config, stored)
    sites, widths, plans = plan_tensors(config, stored)
    groups = dealt(config, [], plans, mesh.shape)
    names = [site.name for site in sites]
    subject = of_iterator(config, drawn, names, device) if drawn else of_tensors(config, stored, names, device)
    about = environment(device, **subject.fingerprint)
    config = _begun(config, config, folder, resume, plans, widths, device, about)
    subject.hold_out(folder, begun=resume and bool(checkpoint.complete(folder)))
    log.info("%s", subject)
    return Setting(config, folder, plans, subject, mesh, groups)


def _begun(
    config: TrainConfig,
    pinned: TrainConfig,
    folder: Path,
    resume: bool,
    plans: list[CoderPlan],
    widths: dict[str, int],
    device: torch.device,
    about: dict[str, Any],
) -> TrainConfig:
    """Returns the config as it stands in the run's folder, where a new run writes it once there is room for it all.

    With it goes the path of the kernels: rank 0 chooses, and a run that goes on keeps it if it can.
    """
    for start in {plan.coder.start_from for plan in plans} - {""}:
        try:
            hub.find_place(start)
        except ConfigError as error:
            raise ConfigError(f"coder.start_from: {str(error).removeprefix('path: ')}") from None

    def written() -> Any:
        check_disk(disk_needed(config, plans, widths)[0], folder)
        if not resume:  # from here on the run can be resumed, if only from its start
            path = kernels.best(device) if config.kernels == "auto" else config.kernels
            atomic_write(folder / "config.yaml", to_yaml(replace(pinned, kernels=path)))
            write_json(folder / "env.json", about | {"kernels": path, "job": own_jobs()})
        return draccus.encode(config if resume else checkpoint.saved_config(folder))

    config = decode(TrainConfig, agreement.agreed(written))
    with agreement.together():
        _compute_by(config.kernels, device, read_json(folder / "env.json").get("kernels") if resume else None)
    return config


def _compute_by(path: str, device: torch.device, before: str | None) -> None:
    """Chooses the path of the kernels; of a run that goes on by another than before, says so."""
    try:
        kernels.use(kernels.best(device) if path == "auto" else path)
    except ConfigError as error:
        if before is None:
            raise
        log.warning("%s", error)
        kernels.use(kernels.best(device))
    if before not in (None, kernels.path()):
        log.warning("kernels: the run was begun with %s and goes on with %s; rounding differs", before, kernels.path())


def pinned(config: TrainConfig, lm: LanguageModel) -> TrainConfig:
    """Returns the config with what would else be found anew at every start: commits, and how much text is wanted."""
    text = replace(config.text, revision=commit_of_data(config.text), max_tokens=config.max_text_tokens)
    return replace(config, model=replace(config.model, revision=lm.revision), text=text)


def _text(config: TrainConfig, lm: LanguageModel, watch: Watch) -> TokenizedText:
    with agreement.rank_zero_first():
        text = tokenize(config.text, lm.tokenizer, lm.source(), watch)
    n_tokens = text.train.n_rows * text.train.context_length
    log.info(
        "text: %s train tokens in rows of %d, %s held out, %s; %.1f epochs planned",
        f"{n_tokens:,}",
        text.train.context_length,
        f"{text.held_out.n_rows * text.held_out.context_length:,}",
        what_was_met(text.meta),
        config.tokens / n_tokens,
    )
    return text


def new_trainers(setting: Setting, source: Source, saved: Path | None, watch: Watch) -> dict[str, CoderTrainer]:
    """Returns a trainer for every own plan, of an untrained coder or, as yet without weights, of one in a checkpoint.

    Rank 0 measures what coders begin with. Each rank makes what it holds of them, and takes over, bit for bit, what the
    first of those has made that hold the same rows.
    """
    config, device, mesh = setting.config, setting.subject.device, setting.mesh
    schedule = Schedule(config.steps, config.dead_after, setting.micro_tokens, DTYPES[config.precision])
    begun = {} if saved else _as_they_begin(setting, source, watch)
    specs = agreement.agreed(lambda: read_json(saved / checkpoint.STATE)["specs"]) if saved else {}
    with agreement.together():
        coders = {
            plan.name: empty_part(CoderSpec.from_json(specs[plan.name]), mesh.latents, device)
            if saved
            else new_part(plan.coder, begun[plan.name], mesh.latents, device)
            for plan in setting.own
        }
    if not saved:
        replicas.copy_of_first_((x for coder in coders.values() for x in coder.state_dict().values()), mesh.data)
    return {
        plan.name: CoderTrainer(coders[plan.name], plan.coder.objectives, plan.optim, schedule, mesh)
        for plan in setting.own
    }


def _as_they_begin(setting: Setting, source: Source, watch: Watch) -> dict[str, Begun]:
    """Returns what every coder of a run begins with, as rank 0 has measured it."""
    found: dict[str, Begun] = {}

    def measured() -> dict[str, Any]:
        found.update(_measured(setting, source, watch))
        return {name: [begun.spec.to_json(), begun.spread] for name, begun in found.items()}

    for name, (told, spread) in agreement.agreed(measured).items():
        if name not in found:
            spec = CoderSpec.from_json(told)
            found[name] = Begun(spec, torch.zeros(spec.d_out), torch.zeros(spec.d_in), spread)
    for name in sorted(found):
        replicas.copy_of_first_((found[name].center, found[name].input_center), ranks.everyone())
    return found


def _measured(setting: Setting, source: Source, watch: Watch) -> dict[str, Begun]:
    """Returns what the coders of a run begin with, by what is measured at their sites."""
    config, subject = setting.config, setting.subject
    wanted = config.activations.statistics_tokens
    samples = sample_activations(subject.sampled(source, wanted), wanted, watch)
    measured: dict[tuple[Any, ...], Statistics] = {}
    begun: dict[str, Begun] = {}
    for plan in setting.plans:
        start = plan.coder.start_from
        like = hub.load(start, dtype="auto").spec if start else None  # whole and undamaged: ranks then read their rows
        recipe = Recipe(
            plan.coder.normalization, config.activations.norm_filter, plan.coder.center, plan.coder.balance_sites
        )
        key = (plan.reads, plan.writes, recipe, start)
        if key not in measured:
            measured[key] = measure(samples, plan.reads, plan.writes, subject.mask, replace(recipe, like=like))
        training = {
            **subject.described["training"],
            "tokens": config.steps * config.batch_tokens,
            "seed": plan.coder.seed,
            "sae-interp": version("sae-interp"),
        }
        begun[plan.name] = Begun.of(plan.coder, measured[key], **subject.described | {"training": training})
    for found in dict.fromkeys(map(str, measured.values())):
        log.info("%s", found)
    return begun
