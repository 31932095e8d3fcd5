"""The usual mistakes of loading a coder, each as the coders that it may have been meant to be.

A mistake yields coders: the same tensors under another spec. Those of place (which tensor is read and written) need the
model only, so that one pass of it can capture the sites of all; the others look at the activations too.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae.base.errors import ConfigError
from sae.base.sums import in_float64
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.evaluation.metrics import fvu
from sae.lm.norms import norm_of
from sae.lm.site import Site
from sae.lm.sites import find_module, resolve_sites
from sae.selection.jumprelu import JumpReLU
from sae.selection.topk import TopK

LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # the number of the layer in a module path
FLIPPED = {"input": "output", "output": "input"}
NORM_BEFORE = {"mlp": "ln2", "feed_forward": "ln2", "self_attn": "ln1", "attn": "ln1", "attention": "ln1"}
KS = (8, 16, 32, 64, 128, 256)  # tried where no L0 is advertised
ALIKE = 0.02  # scales that differ by less are one
THRESHOLD_TOKENS = 512  # from which a threshold is found: all pre-activations of these are sorted


@dataclass(frozen=True)
class Observed:
    """What a language model computed at some sites, one row a token; padding is left out."""

    activations: dict[str, Float[Tensor, "m _d"]]
    usual: Bool[Tensor, "m"]
    """Which tokens count: not special, not at the row's beginning, and no outlier by norm at any of the sites."""
    l0: float | None
    """The advertised L0."""

    def columns(self, sites: tuple[Site, ...], every: bool = False) -> Float[Tensor, "n width"]:
        """Returns the activations of some sites side by side, of the usual tokens or of every one."""
        x = torch.cat([self.activations[site.name] for site in sites], dim=1)
        return x if every else x[self.usual]

    def has(self, spec: CoderSpec) -> bool:
        """Returns whether all sites of a coder are there, with its widths."""
        sides = ((spec.reads, spec.d_in), (spec.writes, spec.d_out))
        there = all(site.name in self.activations for sites, _ in sides for site in sites)
        return there and all(sum(self.activations[s.name].shape[1] for s in sites) == width for sites, width in sides)


def rebuilt(coder: SparseCoder, spec: CoderSpec, **tensors: Tensor) -> SparseCoder:
    """Returns a coder of another spec with the same tensors (shared), but for those given."""
    found = {**coder.state_dict(), **tensors}
    other = SparseCoder(spec, "meta")
    other.load_state_dict({name: found[name] for name in other.state_dict()}, assign=True)
    return other.requires_grad_(False).eval()


def _specs(spec: CoderSpec, **changes: Any) -> Iterator[CoderSpec]:
    """Yields the spec with some changes, unless they do not go together with the rest of it."""
    with contextlib.suppress(ConfigError):
        yield spec.with_(**changes)


def _coders(coder: SparseCoder, **changes: Any) -> Iterator[SparseCoder]:
    yield from (rebuilt(coder, spec) for spec in _specs(coder.spec, **changes))


# ---- place: which tensor


def neighbors(model: nn.Module, spec: CoderSpec) -> Iterator[CoderSpec]:
    """Yields the coder one layer earlier and one later."""
    for step in (-1, 1):
        yield from _placed(model, spec, lambda site, step=step: _moved(site, step), "reads", "writes")


def other_sides(model: nn.Module, spec: CoderSpec) -> Iterator[CoderSpec]:
    """Yields the coder at the other side of its modules, and reading one side to predict the other."""

    def flip(site: Site) -> Site | None:
        return replace(site, side=FLIPPED[site.side]) if site.side in FLIPPED else None

    if not spec.is_autoencoder:
        yield from _placed(model, spec, flip, "reads")
        yield from _placed(model, spec, flip, "writes")
        return
    yield from _placed(model, spec, flip, "reads", "writes")
    if all(site.side in FLIPPED and not site.hook[-1].isdigit() for site in spec.reads):  # a transcoder of a sublayer
        sides = {side: tuple(replace(site, side=side) for site in spec.reads) for side in FLIPPED}
        yield from _specs(spec, reads=sides["input"], writes=sides["output"])


def other_gain(model: nn.Module, spec: CoderSpec) -> Iterator[CoderSpec]:
    """Yields the coder on the other side of the gain of the norm that it reads, or reads behind."""

    def flip(site: Site) -> Site | None:
        layer, norm = LAYER.search(site.hook), NORM_BEFORE.get(site.hook.rpartition(".")[2])
        if site.side == "normalized":
            return replace(site, side="output")
        if site.side == "output" and norm_of(find_module(model, site)[0], site.width or spec.d_in):
            return replace(site, side="normalized")
        if site.side == "input" and layer and norm:
            with contextlib.suppress(ConfigError):
                (found,) = resolve_sites(model, [f"blocks.{layer[0]}.{norm}.hook_normalized"])
                return replace(site, hook=found.hook, side=found.side)
        return None

    yield from _placed(model, spec, flip, *(("reads", "writes") if spec.is_autoencoder else ("reads",)))


def _moved(site: Site, step: int) -> Site | None:
    layer = LAYER.search(site.hook)
    if not layer:
        return None
    number = int(layer[0]) + step
    return replace(site, hook=f"{site.hook[: layer.start()]}{number}{site.hook[layer.end() :]}")


def _placed(
    model: nn.Module, spec: CoderSpec, change: Callable[[Site], Site | None], *names: str
) -> Iterator[CoderSpec]:
    """Yields the coder with the sites that it "reads" or "writes" changed, if this model has them all."""
    found = {name: tuple(filter(None, map(change, getattr(spec, name)))) for name in names}
    if any(len(sites) < len(getattr(spec, name)) for name, sites in found.items()):
        return
    with contextlib.suppress(ConfigError):
        for site in itertools.chain(*found.values()):
            find_module(model, site)
        yield from _specs(spec, **found)


# ---- map: what is done with it


def scales(coder: SparseCoder, observed: Observed) -> Iterator[SparseCoder]:
    """Yields the coder without its normalization, and with others: scaled to |x| = sqrt(d), in all or per token.

    Of the mean norm and of the mean square; measured on usual tokens, as here, and on all, sinks included.
    """
    spec = coder.spec
    if spec.normalization.kind == "center":
        return
    tried = [spec.normalization.scale * spec.reads[0].scale] if spec.normalization.kind == "scalar" else []
    if spec.normalization.kind != "none":
        yield from _coders(coder, normalization=Normalization())
    for every in (False, True):
        for power in (1, 2):
            reads, writes = (
                tuple(replace(site, scale=_scale(observed.columns((site,), every), power)) for site in sites)
                for sites in (spec.reads, spec.writes)
            )
            if all(abs(reads[0].scale / other - 1) > ALIKE for other in tried):
                tried.append(reads[0].scale)
                yield from _coders(coder, normalization=Normalization("scalar"), reads=reads, writes=writes)
    for kind in ("layer_norm", "l2"):
        if kind != spec.normalization.kind:
            yield from _coders(coder, normalization=Normalization(kind))


def pre_biases(coder: SparseCoder, observed: Observed) -> Iterator[SparseCoder]:
    """Yields the coder without the decoder's bias as pre-bias, or with it."""
    other = {"none": "decoder", "decoder": "none"}.get(coder.spec.pre_bias)
    if other:
        yield from _coders(coder, pre_bias=other)


def selections(coder: SparseCoder, observed: Observed) -> Iterator[SparseCoder]:
    """Yields, of a coder that keeps all that is positive, those that keep few: by TopK or one threshold for all.

    So many as advertised or else, of `KS`, the fewest with an FVU within a tenth of the best. These are few choices for
    thousands of numbers, so the best of them is no product of chance; but it says about how many.
    """
    spec = coder.spec
    if not spec.selection.keeps_positive:
        return
    x, target = (observed.columns(sites)[:THRESHOLD_TOKENS].to(coder.like) for sites in (spec.reads, spec.writes))
    ks = [max(1, round(observed.l0))] if observed.l0 else [k for k in KS if k < spec.d_sae]
    scores = coder.scores(x).flatten()
    largest = scores.topk(min(max(ks) * len(x) + 1, len(scores))).values

    def topk(k: int) -> Iterator[SparseCoder]:
        yield from _coders(coder, selection=TopK(k=k))

    def threshold(k: int) -> Iterator[SparseCoder]:
        lowest = largest[min(k * len(x), len(largest) - 1)].clamp_min(0).float()
        for other in _specs(spec, selection=JumpReLU()):
            yield rebuilt(coder, other, threshold=lowest.repeat(spec.d_sae))

    for rule in (topk, threshold):
        found = [other for k in ks for other in rule(k)]
        errors = [fvu(target, other(x).out) for other in found] if len(found) > 1 else [0.0] * len(found)
        yield from [other for other, error in zip(found, errors, strict=True) if error <= 1.1 * min(errors)][:1]


def centerings(coder: SparseCoder, observed: Observed) -> Iterator[SparseCoder]:
    """Yields the coder as one of a model whose writing weights are centered, or as one of the raw model."""
    other = {"none": "center", "center": "none"}.get(coder.spec.normalization.kind)
    if other:
        yield from _coders(coder, normalization=Normalization(other))


def _scale(x: Float[Tensor, "n d"], power: int) -> float:
    """Returns sqrt(d) / (E|x|^power)^(1/power)."""
    return x.shape[1] ** 0.5 / float(in_float64(x).norm(dim=1).pow(power).mean()) ** (1 / power)


PLACES: dict[str, Callable[[nn.Module, CoderSpec], Iterator[CoderSpec]]] = {
    "input and output swapped": other_sides,
    "layer off by one": neighbors,
    "norm's gain (processed weights)": other_gain,
}
MAPS: dict[str, Callable[[SparseCoder, Observed], Iterator[SparseCoder]]] = {
    "input scale": scales,
    "pre-bias": pre_biases,
    "selection": selections,
    "centering (processed weights)": centerings,
}
