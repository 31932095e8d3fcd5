"""Qwen-Scope: one `layer{n}.sae.pt` for each layer, in a repository Qwen/SAE-Res-{model}-W{width}K-L0_{k}.

    a = TopK_k(W_enc x + b_enc),   out = W_dec a + b_dec

W_enc is [d_sae, d] and W_dec [d, d_sae]; there is no pre-bias. A coder reads the residual stream after layer n. How
many latents it keeps is said by the name of the repository, and by its `config.json` where there is one. Code that is
published with such coders has no ReLU after the choice, and neither has this (SAELens has one): only tokens with fewer
than k positive pre-activations tell.
"""

import re

from torch import Tensor

from sae.base.errors import ConfigError, DataError
from sae.coder.spec import CoderSpec
from sae.formats._specs import released_spec
from sae.lm.site import Site
from sae.selection.unrectified_topk import UnrectifiedTopK
from sae.untrusted.configs import as_int
from sae.untrusted.places import Place

WEIGHTS = r"layer\d+\.sae\.pt"
REPOSITORY = re.compile(r"SAE-Res-(?P<model>[\w.-]+)-W(?P<width>\d+)K-L0_(?P<k>\d+)")


def detect(place: Place) -> bool:
    """Returns True: no other format has files of that name, and a file of weights is fetched to be looked into."""
    return True


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors); ConfigError if neither the repository's name nor a config says k."""
    found, known, config = place.tensors(), REPOSITORY.search(place.identity), place.config("config.json")
    d_sae, d_in = found["b_enc"].numel(), found["b_dec"].numel()
    tensors = {
        "W_enc": found.take("W_enc", d_sae, d_in),
        "b_enc": found.take("b_enc", d_sae),
        "W_dec": found.take("W_dec", d_in, d_sae).T,
        "b_dec": found.take("b_dec", d_in),
    }
    if known and int(known["width"]) * 1024 != d_sae:
        raise DataError(f"{place}: its repository's name says {known['width']}K latents, but tensor b_enc has {d_sae}")
    said = {int(known["k"])} if known else set()
    said |= {as_int(config["k"], "k", place)} if "k" in config else set()
    if not said:
        raise ConfigError(
            f"k: {place} does not say how many latents it keeps; load it by its repository's name, such as "
            "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50"
        )
    if len(said) > 1:
        raise DataError(f"{place}: k is {config['k']} in config.json, but another in its repository's name")
    layer = re.findall(r"\d+", place.name)[0]
    model = place.hints.model or str(config.get("base_model") or "") or (f"Qwen/{known['model']}" if known else "")
    sites = (Site(f"blocks.{layer}.hook_resid_post", model=model),)
    return released_spec((d_in, d_in, d_sae), UnrectifiedTopK(said.pop()), (sites, sites), pre_bias="none"), tensors
