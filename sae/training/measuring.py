"""What is measured at a coder's sites before step 0, on unmasked training tokens: limits, scales, centers, variance."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.progress import Watch
from sae.base.sums import in_float64
from sae.coder.normalization import Normalization, by_site
from sae.coder.spec import CoderSpec
from sae.lm.masking import MaskSpec, norm_mask
from sae.lm.site import Site, column_weights
from sae.parallel import ranks
from sae.stream.batch import Block
from sae.stream.sources import Source


@dataclass(frozen=True)
class Statistics:
    """What a coder starts with."""

    reads: tuple[Site, ...]
    """The sites read, with width and scale."""
    writes: tuple[Site, ...]
    """The sites written, with width, scale and weight."""
    mask: MaskSpec
    """The token mask with the norm limits measured here."""
    normalization: Normalization
    """The coder's normalization, with its scale measured here where there is one site."""
    center: Float[Tensor, "d_out"]
    """Mean or geometric median of the normalized targets, or zero."""
    input_center: Float[Tensor, "d_in"]
    """The same of the normalized inputs."""
    input_spread: float
    """Root mean square of the components of the normalized inputs about their mean."""
    variance: float
    """E|y - mean|^2 of the normalized targets, each site's times its weight."""
    median_norms: dict[str, float]
    """Median Euclidean norm of the raw activations, by site name."""
    tokens: int
    """Tokens measured, outliers included."""
    outliers: int
    """Of these, beyond a norm limit."""

    def __str__(self) -> str:
        norms = ", ".join(f"{name} median norm {median:.3g}" for name, median in self.median_norms.items())
        return f"{norms}; {self.outliers:,} of {self.tokens:,} tokens beyond the norm limit are masked"


def sample_activations(source: Source, tokens: int, watch: Watch) -> dict[str, Float[Tensor, "n _d"]]:
    """Returns, by site, the activations of about `tokens` tokens from blocks spread evenly over the text."""
    blocks, n_blocks = [_sound(source, 0)], len(source)
    stride = max(1, n_blocks // max(1, -(-tokens // max(1, len(blocks[0])))))
    with watch.stage("measuring", tokens, "tokens", visible=ranks.rank() == 0) as progress:
        for block in range(stride, n_blocks, stride):
            watch.poll("while measuring statistics")
            if progress.n >= tokens:
                break
            blocks.append(_sound(source, block))
            progress.update(sum(map(len, blocks)))
    return {site: torch.cat([b.activations[site].float() for b in blocks])[:tokens] for site in blocks[0].activations}


def _sound(source: Source, block: int) -> Block:
    found = source.read(block)
    for name, x in found.activations.items():
        refuse_bad_numbers(name, x, f" in {source.told([block])}")
    return found


def refuse_bad_numbers(name: str, x: Float[Tensor, "n d"], where: str = "") -> None:
    """Raises ConfigError if activations at a site hold NaN or Inf."""
    bad = int((~torch.isfinite(x)).any(1).sum())
    if bad:
        raise ConfigError(
            f"activations: {name} holds NaN or Inf at {bad} of {len(x)} tokens{where}; the model is damaged, or its "
            "numbers are too large for its precision (try model.dtype and activations.dtype float32)"
        )


@dataclass(frozen=True)
class Recipe:
    """How a coder begins: by what its activations are measured."""

    normalization: Normalization
    norm_filter: float = 10.0
    """Tokens whose norm exceeds this multiple of the median do not count; 0 keeps all."""
    center: str = "mean"
    """mean, geometric_median or zero."""
    balance: bool = True
    """Whether written sites are weighted so that the FVU of each counts alike."""
    like: CoderSpec | None = None
    """The spec whose scales and weights are taken over, if any: the weights of a coder that goes on need them."""


def measure(
    activations: dict[str, Float[Tensor, "n _d"]],
    reads: tuple[Site, ...],
    writes: tuple[Site, ...],
    mask: MaskSpec,
    recipe: Recipe,
) -> Statistics:
    """Returns the statistics of raw activations by site name: limits, scales, then center and variance of what is left.

    ConfigError names the site if nothing is left, or if it holds NaN or Inf.
    """
    names = list(dict.fromkeys(site.name for site in (*reads, *writes)))
    medians = {name: _median_norm(name, activations[name]) for name in names}
    limits = {name: recipe.norm_filter * median for name, median in medians.items() if recipe.norm_filter * median}
    mask = replace(mask, norm_limits=limits)
    usual = norm_mask({name: activations[name] for name in names}, mask)
    if not usual.any():
        raise ConfigError(f"activations.norm_filter: {recipe.norm_filter:g} leaves none of {len(usual):,} tokens")
    kept = {name: activations[name][usual] for name in names}
    reads, writes, normalization = _scaled(kept, reads, writes, recipe)
    x, y = (_normalized(kept, sites, normalization) for sites in (reads, writes))
    if recipe.balance and not recipe.like and len(writes) > 1:
        writes = _balanced(y, writes)
        reads = writes if [s.name for s in reads] == [s.name for s in writes] else reads
    weights = column_weights(writes).to(y.device)
    square = (y - y.mean(0)).square().mean(0)
    floor = 1e-12 * float((weights * y.square().mean(0)).sum())  # constant inputs: no more than rounding
    return Statistics(
        reads,
        writes,
        mask,
        normalization,
        _center(y, recipe.center),
        _center(x, recipe.center),
        float(x.var(0, correction=0).mean()) ** 0.5,
        max(float((weights * square).sum()), floor, 1e-30),
        medians,
        len(usual),
        int((~usual).sum()),
    )


def _scaled(
    kept: dict[str, Tensor], reads: tuple[Site, ...], writes: tuple[Site, ...], recipe: Recipe
) -> tuple[tuple[Site, ...], tuple[Site, ...], Normalization]:
    """Returns the sites with width and scale, and the normalization with the scale of a coder of one site."""
    normalization, like = recipe.normalization, recipe.like
    scales = {name: _scale(x) if normalization.kind == "scalar" else 1.0 for name, x in kept.items()}
    if normalization.scale != 1.0:  # given, not to be measured
        scales = dict.fromkeys(scales, 1.0)
    if like:
        normalization = replace(like.normalization, kind=normalization.kind)
        scales |= {site.name: site.scale for site in (*like.reads, *like.writes)}
    elif reads == writes and len(reads) == 1:
        normalization = replace(normalization, scale=normalization.scale * scales[reads[0].name])
        scales = dict.fromkeys(scales, 1.0)
    known = {site.name: site.weight for site in like.writes} if like else {}

    def found(site: Site) -> Site:
        weight = known.get(site.name, 1.0) if like else site.weight
        return replace(site, width=kept[site.name].shape[1], scale=scales[site.name], weight=weight)

    return tuple(map(found, reads)), tuple(map(found, writes)), normalization


def _balanced(y: Float[Tensor, "n d"], writes: tuple[Site, ...]) -> tuple[Site, ...]:
    """Returns written sites with weights under which each has the same share of the variance."""
    spread = [float(part.var(0, correction=0).sum()) for part in y.split([s.width for s in writes], dim=1)]
    mean = sum(spread) / len(spread)
    return tuple(replace(s, weight=mean / max(v, 1e-12 * mean, 1e-30)) for s, v in zip(writes, spread, strict=True))


def _median_norm(name: str, x: Float[Tensor, "n d"]) -> float:
    if not len(x):
        raise ConfigError(
            "text: every token is masked (special tokens and skipped positions); nothing is left to train on"
        )
    refuse_bad_numbers(name, x)
    return float(x.norm(dim=1).median())


def _scale(x: Float[Tensor, "n d"]) -> float:
    """Returns the factor that makes E|x|^2 = d."""
    root = float(in_float64(x).square().sum(1).mean().sqrt())
    return x.shape[1] ** 0.5 / root if root > 0 else 1.0


def _normalized(kept: dict[str, Tensor], sites: tuple[Site, ...], normalization: Normalization) -> Float[Tensor, "n d"]:
    columns = torch.cat([kept[site.name] for site in sites], dim=1)
    return in_float64(by_site(normalization, [(site.width, site.scale) for site in sites], columns)[0])


def _center(y: Float[Tensor, "n d"], center: str) -> Float[Tensor, "d"]:
    if center == "geometric_median":
        return geometric_median(y).float()
    return (y.mean(0) if center == "mean" else torch.zeros_like(y[0])).float()


def geometric_median(x: Float[Tensor, "n d"], rounds: int = 100, tolerance: float = 1e-7) -> Float[Tensor, "d"]:
    """Returns the point with the least summed distance to the rows of x, by Weiszfeld's iteration."""
    center = x.mean(0)
    for _ in range(rounds):
        weights = 1 / (x - center).norm(dim=1).clamp_min(1e-12)
        moved = (weights[:, None] * x).sum(0) / weights.sum()
        if (moved - center).norm() <= tolerance * center.norm().clamp_min(1e-12):
            return moved
        center = moved
    return center
