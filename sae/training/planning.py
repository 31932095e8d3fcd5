"""What a run will train: which coder reads and writes which sites."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from sae.base.errors import ConfigError
from sae.coder.spec import CoderSpec
from sae.lm.hooks import site_widths, sites_of_model
from sae.lm.models import LanguageModel, ModelConfig
from sae.lm.site import SECOND, Site
from sae.lm.sites import resolve_sites
from sae.stream.tensors import Stored
from sae.training.config import CoderConfig, OptimConfig, TrainConfig


@dataclass(frozen=True)
class CoderPlan:
    """One coder to train: where it reads and writes, and how it is built."""

    name: str
    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    coder: CoderConfig
    optim: OptimConfig

    @property
    def sites(self) -> dict[str, Site]:
        """Returns the sites by name, each once."""
        return {site.name: site for site in (*self.reads, *self.writes)}

    @property
    def d_in(self) -> int:
        """Returns the width of what is read."""
        return sum(site.width for site in self.reads)

    @property
    def d_out(self) -> int:
        """Returns the width of what is written."""
        return sum(site.width for site in self.writes)

    @property
    def d_sae(self) -> int:
        """Returns the number of latents."""
        return self.coder.width(self.d_in)

    @property
    def spec(self) -> CoderSpec:
        """Returns the spec before anything is measured; ConfigError for what does not go together."""
        try:
            spec = self.coder.spec(self.reads, self.writes, self.coder.normalization)
            for term in self.coder.objectives.values():
                term.validate(spec.d_sae, spec.selection, spec.n_blocks)
            return spec
        except ConfigError as error:
            raise ConfigError(f"coder.{error}") from None

    @property
    def parameters(self) -> int:
        """Returns the number of trained parameters."""
        spec, layers = self.spec, self.spec.n_blocks
        encoder, decoder = self.d_sae * self.d_in // layers, self.d_sae * (layers + 1) * self.d_out // (2 * layers)
        extra = len(spec.selection.parameters(0)) * self.d_sae + self.d_in * self.d_out * spec.skip // layers
        return encoder + decoder + extra + self.d_sae + self.d_out + self.d_in * (spec.pre_bias == "own")


def plan_run(
    config: TrainConfig, lm: LanguageModel, second: LanguageModel | None = None
) -> tuple[list[Site], dict[str, int], list[CoderPlan]]:
    """Returns the sites that a run reads, their widths by name, and its coders; ConfigError for what cannot be."""
    for model in (lm, second) if second else (lm,):
        model.check_context(config.text.context_length)
    pairs = site_pairs(config, lm, second)
    sites = list({site.name: site for pair in pairs for site in pair}.values())
    widths = site_widths(lm, sites_of_model(sites, ""))
    if second:
        widths |= site_widths(second, sites_of_model(sites, SECOND))
    return sites, widths, plan_coders(config, pairs, widths)


def check_ranks(config: TrainConfig, n: int) -> None:
    """Raises ConfigError unless each of n ranks has a part of every batch: a lane, or a row of text."""
    length, lanes, tokens = config.text.context_length, config.activations.lanes, config.batch_tokens
    if config.needs_rows and tokens < n * length:
        raise ConfigError(
            f"batch_tokens: {tokens} are {tokens // length} rows of {length} tokens for {n} ranks; set it to "
            f"{n * length} or more, or take {tokens // length} ranks"
        )
    if lanes < n and not config.needs_rows:
        fits = next((m for m in range(n, tokens + 1) if tokens % m == 0), None)
        to = f"{fits}" if fits else f"{n}, and batch_tokens to a multiple of that"
        raise ConfigError(
            f"activations.lanes: {lanes} for {n} ranks, of which each needs one; set it to {to}, or take {lanes} ranks "
            "(a run that has begun keeps its lanes)"
        )


def with_model_named(config: TrainConfig, stored: Stored) -> Stored:
    """Returns activations that say of which model they are: what is stored with them, or else `model.name`.

    The default is none that anybody has named.
    """
    said = {}
    for tag, model in (("", config.model), (f"{SECOND} ", config.second_model)):
        if model.name not in ("", ModelConfig().name):
            said |= {f"{tag}model": model.name, f"{tag}revision": model.revision}
    return replace(stored, about=said | stored.about)


def plan_tensors(config: TrainConfig, stored: Stored) -> tuple[list[Site], dict[str, int], list[CoderPlan]]:
    """Returns the same as `plan_run`, of stored activations."""
    pairs = _pairs(config, stored.sites)
    sites = list({site.name: site for pair in pairs for site in pair}.values())
    widths = {site.name: site.width for site in sites}
    return sites, widths, plan_coders(config, pairs, widths, ordered=False)


def site_pairs(config: TrainConfig, lm: LanguageModel, second: LanguageModel | None = None) -> list[tuple[Site, Site]]:
    """Returns the (read, written) sites that a config names, in order; of an autoencoder both are one.

    ConfigError for a site that is not there, and for a model that cannot do what the config asks for.
    The sites of a second model follow those of the first, with a tag.
    """
    if second is not None:
        pairs = [tuple(replace(site, tag=SECOND) for site in pair) for pair in site_pairs(config, second)]
        return site_pairs(config, lm) + pairs  # type: ignore[return-value]
    if not lm.is_causal and (config.needs_rows or config.gradient_loss):
        what = "end-to-end terms (kl, ce) need" if config.needs_rows else "selection gradient_topk needs"
        raise ConfigError(f"coder: {what} a model that predicts the next token, and {lm.name} does not")
    return _pairs(config, lambda typed, field: resolve_sites(lm.model, [typed], lm.name, lm.revision, field))


def _pairs(config: TrainConfig, resolve: Callable[[str, str], list[Site]]) -> list[tuple[Site, Site]]:
    """Returns the (read, written) sites, each found by `resolve` of what was typed and the field where."""
    settings, pairs = config.activations, []
    for i, typed in enumerate(settings.sites):
        reads = resolve(typed, "activations.sites")
        target = settings.targets[i] if settings.targets else None
        writes = resolve(target, "activations.targets") if target else reads
        if len(reads) != len(writes):
            found = f"{len(writes)} sites, but {typed!r} {len(reads)}"
            raise ConfigError(f"activations.targets: {target!r} names {found}; each site needs its own target")
        pairs += zip(reads, writes, strict=True)
    return list(dict.fromkeys(pairs))


def plan_coders(
    config: TrainConfig, pairs: list[tuple[Site, Site]], widths: dict[str, int], ordered: bool = True
) -> list[CoderPlan]:
    """Returns the coders of every grid point, site by site; ConfigError for what does not fit the sites.

    `widths` are those of the sites by name, if `ordered` in the order in which the model computes them. Grid points
    with a skip path leave out autoencoders.
    """
    by_place: dict[str, list[CoderPlan]] = {}
    for label, coder, optim in config.points():
        alone = {_folder(*pair): [pair] for pair in pairs}
        for place, group in alone.items() if coder.layout == "per_site" else [(coder.layout, pairs)]:
            reads, writes = (
                tuple(replace(site, width=widths[site.name]) for site in side) for side in zip(*group, strict=True)
            )
            if ordered and coder.layout != "crosscoder":
                _check_order(reads, writes, list(widths), coder.layout == "cross_layer")
            plan = CoderPlan(f"{place}/{label}" if label else place, reads, writes, coder, optim)
            coder.validate(plan.d_in)
            if coder.skip and reads == writes:  # it would copy its input
                continue
            _ = plan.spec  # raises what does not go together
            by_place.setdefault(place, []).append(plan)
    if not by_place:
        raise ConfigError("coder.skip: true lets an autoencoder copy its input; it is for transcoders")
    return [plan for plans in by_place.values() for plan in plans]


def _check_order(reads: tuple[Site, ...], writes: tuple[Site, ...], order: list[str], to_later: bool) -> None:
    """Refuses to predict what the model has computed before: it could not be replaced by the prediction."""
    for i, read in enumerate(reads):
        for write in writes[i:] if to_later else writes[i : i + 1]:
            if order.index(write.name) < order.index(read.name):
                field = "activations.sites" if read in writes else "activations.targets"
                raise ConfigError(
                    f"{field}: {write.name} is computed before {read.name}, from which it is to be predicted"
                )


def _folder(read: Site, write: Site) -> str:
    return read.folder if read == write else f"{read.folder}-to-{write.folder}"
