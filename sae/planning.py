"""What a run will train: which coder reads and writes which sites."""

from dataclasses import dataclass, replace

from sae.config import CoderConfig, OptimConfig, TrainConfig
from sae.errors import ConfigError
from sae.models import LanguageModel
from sae.sites import resolve
from sae.spec import Site


@dataclass(frozen=True)
class Planned:
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
    def parameters(self) -> int:
        """Returns the number of trained parameters."""
        layers = len(self.reads) if self.coder.layout == "cross_layer" else 1
        encoder, decoder = self.d_sae * self.d_in // layers, self.d_sae * (layers + 1) * self.d_out // (2 * layers)
        extra = len(self.coder.selection.parameters(0)) * self.d_sae + self.d_in * self.d_out * self.coder.skip
        biases = self.d_sae + self.d_out + (self.d_in if self.reads != self.writes else 0)
        return encoder + decoder + extra + biases


def paired(config: TrainConfig, lm: LanguageModel) -> list[tuple[Site, Site]]:
    """Returns the (read, written) sites that a config names, in order; of an autoencoder both are one."""
    settings, pairs = config.activations, []
    for i, typed in enumerate(settings.sites):
        reads = resolve(lm.model, [typed], lm.name, lm.revision)
        target = settings.targets[i] if settings.targets else None
        writes = resolve(lm.model, [target], lm.name, lm.revision, "activations.targets") if target else reads
        if len(reads) != len(writes):
            found = f"{len(writes)} sites, but {typed!r} {len(reads)}"
            raise ConfigError(f"activations.targets: {target!r} names {found}; each site needs its own target")
        pairs += zip(reads, writes, strict=True)
    return list(dict.fromkeys(pairs))


def plan(config: TrainConfig, pairs: list[tuple[Site, Site]], widths: dict[str, int]) -> list[Planned]:
    """Returns the coders of every grid point; ConfigError for what does not fit the widths of the sites."""
    planned = []
    for label, coder, optim in config.points():
        alone = coder.layout == "per_site"
        for name, group in {_folder(*pair): [pair] for pair in pairs}.items() if alone else [(coder.layout, pairs)]:
            reads, writes = (
                tuple(replace(site, width=widths[site.name]) for site in side) for side in zip(*group, strict=True)
            )
            found = Planned(f"{name}/{label}" if label else name, reads, writes, coder, optim)
            coder.validate(found.d_in)
            planned.append(found)
    order = {plan.name.partition("/")[0]: None for plan in planned}
    return sorted(planned, key=lambda plan: list(order).index(plan.name.partition("/")[0]))


def _folder(read: Site, write: Site) -> str:
    return read.folder if read == write else f"{read.folder}-to-{write.folder}"
