"""A coder in the language model: what it writes in place of what the model computes.

with splice(lm.model, coder): logits = lm.model(tokens).logits
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae.base.errors import ConfigError
from sae.coder.arguments import CoderLike, as_coder
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.lm.hooks import hooked
from sae.lm.intervene import replace_at
from sae.lm.models import LanguageModel, module_of
from sae.lm.site import Site, tagged_columns


@torch.no_grad()
def directions(coder: SparseCoder, latents: Int[Tensor, "m"]) -> Float[Tensor, "m d_out"]:
    """Returns what a unit of each latent adds to the output, in the units of the model.

    A per-token normalization, whose factor every token has of its own, is left out.
    """
    out = coder.decoder_rows(latents)
    if coder.spec.normalization.per_token:
        return out
    return out * coder.spec.normalize(out.new_zeros(1, coder.spec.d_in))[1][1]


def reads_ahead(spec: CoderSpec) -> bool:
    """Returns whether what a coder writes somewhere depends on a site that the model computes only later.

    A crosscoder does, and a cross-layer coder whose layers share one budget per token.
    """
    if spec.cross_layer:
        return spec.budget == "shared" and spec.rule.competes(bool(spec.calibration)) == "token"
    return len(spec.reads) > 1


@contextmanager
def splice(
    model: nn.Module | LanguageModel,
    coder: CoderLike,
    keep: Bool[Tensor, "rows context"] | None = None,
    error: bool = False,
    given: dict[str, Float[Tensor, "rows context _d"]] | None = None,
    gradients: Float[Tensor, "rows context d_out"] | None = None,
    tag: str = "",
) -> Iterator[None]:
    """While open, the model computes with the coder's output in place of the activations it reconstructs.

    The model is a loaded one, of transformers or ours; the coder may be an address as of `sae.load`.
    A coder that reads and writes one site replaces that tensor; one that writes elsewhere (a transcoder) replaces the
    tensors at the sites it writes, of what it has read in the same pass: every site sees the earlier ones replaced. A
    coder that `reads_ahead` cannot do so; it must be `given` its inputs by site name, those of the model as it is
    (ConfigError without). With `error`, the difference between the original and the reconstruction is added back as a
    constant: the model's output is unchanged until latents are edited. `keep` limits it to some positions; `gradients`
    are for a coder whose inference looks at them; of a coder of two models, `tag` says which of them `model` is.
    """
    coder, model = as_coder(coder), module_of(model)
    spec = coder.spec
    if not spec.is_placed:
        raise ConfigError("site: the coder does not say where it reads and writes; say it when loading: site=...")
    if given is None and reads_ahead(spec):
        raise ConfigError("splice: this coder reads sites that come after those it writes; pass what it reads as given")
    seen: dict[str, Tensor] = dict(given or {})

    def remember(site: Site, x: Tensor) -> None:
        if site == spec.reads[0]:  # a new pass of the model
            seen.clear()
        seen[site.name] = x.to(coder.device, copy=True)  # what follows may add to it in place

    def made(site: Site, part: slice) -> Callable[[Tensor], Tensor]:
        def new(x: Tensor) -> Tensor:
            if spec.is_autoencoder and given is None:
                remember(site, x)
            like = next(iter(seen.values()))
            parts = [seen.get(s.name, like.new_zeros(*like.shape[:-1], s.width)) for s in spec.reads]  # later layers
            out = _at_kept(coder, torch.cat([part.float() for part in parts], dim=-1), gradients, keep)[..., part]
            return out + (x.to(out.device).float() - out).detach() if error else out

        return new

    with ExitStack() as stack:
        if given is None and not spec.is_autoencoder:
            stack.enter_context(hooked(model, list(spec.reads), remember))
        for site, part in tagged_columns(spec.writes, tag):
            stack.enter_context(replace_at(model, site, made(site, part), keep))
        yield


def _at_kept(
    coder: SparseCoder,
    x: Float[Tensor, "rows context d_in"],
    gradients: Float[Tensor, "rows context d_out"] | None,
    keep: Bool[Tensor, "rows context"] | None,
) -> Float[Tensor, "rows context d_out"]:
    """Returns what a coder makes of x at the kept positions, and anything elsewhere: it looks at no others."""
    if keep is None:
        return coder(x, gradients).out
    beside = None if gradients is None else gradients[keep.to(gradients.device)]
    out = coder(x[keep.to(x.device)], beside).out
    return out.new_zeros(*x.shape[:-1], coder.spec.d_out).index_put((keep.to(out.device),), out)
