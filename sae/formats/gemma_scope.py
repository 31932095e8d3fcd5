"""Gemma Scope 1: a folder .../layer_12/width_16k/average_l0_82 with `params.npz`, and no config (2408.05147).

    a = h 1[h > threshold],   h = x W_enc + b_enc,   out = a W_dec + b_dec

W_enc is stored as [d_in, d_sae]; there is no pre-bias and no normalization. Repository and path say the rest. `res`
coders read and write the residual stream after the layer, `mlp` what the MLP adds to it (after the norm that follows),
`att` the concatenated heads. Two questions no source settles, so the user must: embedding coders are of the embedding
with Gemma's factor sqrt(d) or without (`scale`); transcoders read the norm before the MLP, before or after its gain
(`site`).
"""

import re

from torch import Tensor

from sae.base.errors import ConfigError, DataError
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.formats._specs import released_spec, unsaid_sites
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection.jumprelu import JumpReLU
from sae.untrusted.places import Place

WEIGHTS = r"params\.npz"
HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
TENSORS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
REPOSITORY = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<tuning>pt|it)-(?P<kind>res|mlp|att|transcoders)")


def detect(place: Place) -> bool:
    """Returns whether the archive holds a JumpReLU coder's five tensors."""
    return {name.lower() for name in place.shapes()} >= TENSORS


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors)."""
    opened = place.tensors()
    found = {name.lower(): opened[name] for name in opened}
    (d_sae,), (d_out,) = found["b_enc"].shape, found["b_dec"].shape
    d_in = sum(found["w_enc"].shape) - d_sae
    lower = place.as_tensors(found)
    tensors = {
        "W_enc": lower.matrix("w_enc", d_sae, d_in, transposed=True),
        "W_dec": lower.matrix("w_dec", d_sae, d_out),
        "b_enc": lower["b_enc"],
        "b_dec": lower["b_dec"],
        "threshold": lower.take("threshold", d_sae),
    }
    reads, writes = _sites(place)
    if reads and reads == writes and d_in != d_out:
        raise DataError(f"{place}: w_enc has width {d_in} and b_dec {d_out}, but an autoencoder has one width")
    normalization = Normalization()
    if "/embedding/" in _below(place):
        why = "hook_embed has Gemma's factor sqrt(d), and the coder may be of embeddings without it"
        scale = float(place.required_hint("scale", why, f"1 or {d_in**-0.5:.6g}", (1.0, d_in**-0.5)))
        normalization = normalization if scale == 1 else Normalization("scalar", scale)
    l0 = re.search(r"average_l0_(\d+)/", _below(place))
    spec = released_spec(
        (d_in, d_out, d_sae),
        JumpReLU(),
        (reads, writes),
        pre_bias="none",
        normalization=normalization,
        mask=MaskSpec(skip_positions=1),  # trained without BOS, which must be there all the same
        context_length=1024,
        metrics={"advertised": {"l0": float(l0[1])}} if l0 else {},
    )
    return spec, tensors


def _below(place: Place) -> str:
    """Returns the path below the repository: folders above it may be called anything."""
    return place.identity[max((found.end() for found in REPOSITORY.finditer(place.identity)), default=0) :]


def _sites(place: Place) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    known = REPOSITORY.search(place.identity)
    if not known:
        return (), ()
    layer = re.search(r"/layer_(\d+)/", _below(place))
    model = place.hints.model or f"google/gemma-2-{known['size']}" + ("-it" if known["tuning"] == "it" else "")
    if "/embedding/" in _below(place):
        site = Site("hook_embed", model=model)
        return (site,), (site,)
    if not layer:
        return (), ()
    if known["kind"] == "transcoders":
        why = "it is known to read the norm before the MLP, but not on which side of that norm's gain"
        before = f"blocks.{layer[1]}.ln2.hook_normalized"
        after = f"model.layers.{layer[1]}.pre_feedforward_layernorm"
        said = place.site_hint(why, f"{before!r} or {after!r}", (before, after))
        if said not in (before, after, None):
            raise ConfigError(f"site: {said!r} is not where {place} reads; allowed: {before}, {after}")
        read = Site(said, model=model) if said else unsaid_sites(model)[0]
        return (read,), (Site(f"blocks.{layer[1]}.hook_mlp_out", model=model),)
    site = Site(f"blocks.{layer[1]}.{HOOKS[known['kind']]}", model=model)
    return (site,), (site,)
