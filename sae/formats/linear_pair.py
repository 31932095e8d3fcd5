"""Two linear layers in a single .pt or .pth file without config: Goodfire's coders and qresearch's of DeepSeek-R1.

    a = ReLU(W_enc x + b_enc),   out = W_dec a + b_dec

There is no pre-bias and no normalization. Goodfire calls the layers `encoder_linear` and `decoder_linear`, qresearch
`encoder` and `decoder`, with weights [d_sae, d] and [d, d_sae]. The file's name, {model}-SAE-l{layer}, says the site:
the residual stream after that layer. As so many coders have an encoder and a decoder, those need that name.
"""

import re

from torch import Tensor

from sae.base.errors import DataError
from sae.coder.spec import CoderSpec
from sae.formats._specs import released_spec
from sae.lm.site import Site
from sae.selection.relu import ReLU
from sae.untrusted.places import Place

WEIGHTS = r".+\.pth?"
GOODFIRE, QRESEARCH = ("encoder_linear", "decoder_linear"), ("encoder", "decoder")
NAME = re.compile(r"(?P<model>[\w.-]+)-SAE-l(?P<layer>\d+)\.pth?")
OWNERS = {"Llama": "meta-llama", "DeepSeek": "deepseek-ai"}


def detect(place: Place) -> bool:
    """Returns whether the file holds weight and bias of two layers called so, and nothing else."""
    try:
        names = place.shapes().keys()
    except DataError:  # someone else's
        return False
    return names == _names(GOODFIRE) or (names == _names(QRESEARCH) and bool(NAME.fullmatch(place.name)))


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors)."""
    found = place.tensors()
    encoder, decoder = GOODFIRE if f"{GOODFIRE[0]}.weight" in found else QRESEARCH
    d_sae, d_in = found[f"{encoder}.bias"].numel(), found[f"{decoder}.bias"].numel()
    tensors = {
        "W_enc": found.take(f"{encoder}.weight", d_sae, d_in),
        "b_enc": found.take(f"{encoder}.bias", d_sae),
        "W_dec": found.take(f"{decoder}.weight", d_in, d_sae).T,
        "b_dec": found.take(f"{decoder}.bias", d_in),
    }
    sites = _sites(place)
    return released_spec((d_in, d_in, d_sae), ReLU(), (sites, sites), pre_bias="none"), tensors


def _names(layers: tuple[str, str]) -> set[str]:
    return {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def _sites(place: Place) -> tuple[Site, ...]:
    known = NAME.fullmatch(place.name)
    hook = f"blocks.{known['layer']}.hook_resid_post" if known else ""
    owner = OWNERS.get(known["model"].partition("-")[0]) if known else None
    model = place.hints.model or (f"{owner}/{known['model']}" if known and owner else "")
    return (Site(hook, model=model),) if hook else ()
