"""Changing what a language model computes at a site: splice a coder in, ablate, add a direction, replace by anything.

with splice(lm.model, coder): logits = lm.model(tokens).logits
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae.activations import ONE_AT_A_TIME, hooked, model_inputs
from sae.coder import SparseCoder
from sae.errors import ConfigError
from sae.models import LanguageModel
from sae.spec import CoderSpec, Site, columns_of

MOST_GROWTH = math.log(10)  # of the strength from one guess to the next, while only one side of the target is known


@contextmanager
def replace_at(
    model: nn.Module,
    site: Site,
    new: Callable[[Float[Tensor, "rows context d"]], Float[Tensor, "rows context d"]],
    keep: Bool[Tensor, "rows context"] | None = None,
) -> Iterator[None]:
    """While open, the tensor at `site` is `new(tensor)` at the positions in `keep` and untouched elsewhere."""

    def see(_: Site, x: Tensor) -> Tensor:
        made = new(x).to(x)
        return made if keep is None else torch.where(keep[..., None], made, x)

    with hooked(model, [site], see):
        yield


@contextmanager
def ablate(
    model: nn.Module,
    sites: Sequence[Site],
    keep: Bool[Tensor, "rows context"] | None = None,
    mean: Float[Tensor, "d_out"] | None = None,
    tag: str = "",
) -> Iterator[None]:
    """While open, the tensors at `sites` are zero, or their part of `mean`, at the positions in `keep`.

    Only the sites with this tag are in `model`.
    """

    def new(part: slice) -> Callable[[Tensor], Tensor]:
        def made(x: Tensor) -> Tensor:
            return torch.zeros_like(x) if mean is None else mean[part].to(x).expand_as(x)

        return made

    with ExitStack() as stack:
        for site, part in _of(sites, tag):
            stack.enter_context(replace_at(model, site, new(part), keep))
        yield


@contextmanager
def add(
    model: nn.Module,
    sites: Sequence[Site],
    direction: Float[Tensor, "d_out"],
    keep: Bool[Tensor, "rows context"] | None = None,
    tag: str = "",
) -> Iterator[None]:
    """While open, its part of `direction` is added to the tensor at each of `sites`, at the positions in `keep`.

    Only the sites with this tag are in `model`.
    """
    with ExitStack() as stack:
        for site, part in _of(sites, tag):
            stack.enter_context(replace_at(model, site, lambda x, part=part: x + direction[part].to(x), keep))
        yield


@torch.no_grad()
def written(coder: SparseCoder, latents: Int[Tensor, "m"]) -> Float[Tensor, "m d_out"]:
    """Returns the decoder rows of some latents, in float32; zero in columns that a latent does not write."""
    return coder.decoder_rows(latents)


@torch.no_grad()
def directions(coder: SparseCoder, latents: Int[Tensor, "m"]) -> Float[Tensor, "m d_out"]:
    """Returns what a unit of each latent adds to the output, in the units of the model.

    A per-token normalization, whose factor every token has of its own, is left out.
    """
    out = written(coder, latents)
    if coder.spec.normalization.per_token:
        return out
    return out * coder.spec.normalize(out.new_zeros(1, coder.spec.d_in))[1][1]


@torch.no_grad()
def next_logits(
    lm: LanguageModel, tokens: Int[Tensor, "rows context"], lengths: Int[Tensor, "rows"]
) -> Float[Tensor, "rows vocabulary"]:
    """Returns the logits, in float32, of what follows the first `lengths` tokens of each row; the rest is padding.

    The unembedding sees one position a row: all of them would take gigabytes with a large vocabulary.
    """
    rows, last = torch.arange(len(tokens), device=lm.device), lengths.to(lm.device) - 1

    def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows, last][:, None], *args[1:])

    unembedding = lm.model.get_output_embeddings()
    with ONE_AT_A_TIME, ExitStack() as stack:  # `hooked` keeps the shape of what it sees; here it is to change
        if unembedding is not None:
            stack.callback(unembedding.register_forward_pre_hook(narrow).remove)
        logits = lm.model(**model_inputs(lm, tokens)).logits
    return (logits[:, 0] if unembedding is not None else logits[rows, last]).float()


class Matched(NamedTuple):
    """The strength that was found, and what it gives."""

    strength: float
    kl: float
    """In nats."""
    reached: bool
    """Whether `kl` is within the tolerance of the target."""


def matched_strength(
    measure: Callable[[float], float], target: float, start: float, tolerance: float = 0.1, steps: int = 10
) -> Matched:
    """Returns the strength at which `measure(strength)`, a divergence in nats, is within `tolerance` x target.

    A search on logarithmic scales. A small divergence goes with the square of the strength, which gives a guess a
    little beyond the target; strides double until the target lies between two guesses, and from then on it is
    interpolated. After `steps` measurements, the nearest.
    """
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    best = Matched(0.0, 0.0, False)
    goal, place, stride = math.log(target), math.log(start), 0.0
    for _ in range(steps):
        strength = math.exp(place)
        found = measure(strength)
        best = min(best, Matched(strength, found, abs(found - target) <= tolerance * target), key=_miss(target))
        if best.reached:
            break
        capped = found if found < 1e6 * target else 1e6 * target  # NaN, of an overflow, is too much as well
        here = (place, math.log(max(capped, 1e-6 * target)))
        low, high = (here, high) if here[1] < goal else (low, here)
        if low and high:
            share = (goal - low[1]) / (high[1] - low[1])
            place = low[0] + min(0.9, max(0.1, share)) * (high[0] - low[0])
        else:
            stride = min(MOST_GROWTH, max(2 * stride, 0.6 * abs(goal - here[1])))
            place += stride if low else -stride
    return best


def _miss(target: float) -> Callable[[Matched], float]:
    return lambda matched: abs(matched.kl - target) if math.isfinite(matched.kl) else math.inf


def reads_ahead(spec: CoderSpec) -> bool:
    """Returns whether what a coder writes somewhere depends on a site that the model computes only later.

    A crosscoder does, and a cross-layer coder whose layers share one budget per token.
    """
    if spec.cross_layer:
        return spec.budget == "shared" and spec.rule.competes(bool(spec.calibration))
    return len(spec.reads) > 1


@contextmanager
def splice(
    model: nn.Module,
    coder: SparseCoder,
    keep: Bool[Tensor, "rows context"] | None = None,
    error: bool = False,
    given: dict[str, Float[Tensor, "rows context d"]] | None = None,
    gradients: Float[Tensor, "rows context d_out"] | None = None,
    tag: str = "",
) -> Iterator[None]:
    """While open, the model computes with the coder's output in place of the activations it reconstructs.

    A coder that reads and writes one site replaces that tensor; one that writes elsewhere (a transcoder) replaces the
    tensors at the sites it writes, of what it has read in the same pass: every site sees the earlier ones replaced. A
    coder that `reads_ahead` cannot do so; it must be `given` its inputs by site name, those of the model as it is
    (ConfigError without). With `error`, the difference between the original and the reconstruction is added back as a
    constant: the model's output is unchanged until latents are edited. `keep` limits it to some positions; `gradients`
    are for a coder whose inference looks at them; of a coder of two models, `tag` says which of them `model` is.
    """
    spec = coder.spec
    if given is None and reads_ahead(spec):
        raise ConfigError("splice: this coder reads sites that come after those it writes; pass what it reads as given")
    seen: dict[str, Tensor] = dict(given or {})

    def remember(site: Site, x: Tensor) -> None:
        if site == spec.reads[0]:  # a new pass of the model
            seen.clear()
        seen[site.name] = x

    def made(site: Site, part: slice) -> Callable[[Tensor], Tensor]:
        def new(x: Tensor) -> Tensor:
            if spec.is_autoencoder and given is None:
                remember(site, x)
            like = next(iter(seen.values()))
            parts = [seen.get(s.name, like.new_zeros(*like.shape[:-1], s.width)) for s in spec.reads]  # later layers
            inputs = torch.cat([part.float() for part in parts], dim=-1)
            out = coder(inputs, gradients).out[..., part]
            return out + (x.to(out.device).float() - out).detach() if error else out

        return new

    with ExitStack() as stack:
        if given is None and not spec.is_autoencoder:
            stack.enter_context(hooked(model, list(spec.reads), remember))
        for site, part in _of(spec.writes, tag):
            stack.enter_context(replace_at(model, site, made(site, part), keep))
        yield


def _of(sites: Sequence[Site], tag: str) -> list[tuple[Site, slice]]:
    """Returns the sites with a tag, and the columns of each among all."""
    return [(site, part) for site, part in zip(sites, columns_of(sites), strict=True) if site.tag == tag]
