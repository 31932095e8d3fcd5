"""Kissane's and Krzyzanowski's coders of attention outputs (2406.17759): `{name}.pt` and `{name}_cfg.json`.

    a = ReLU(W_enc (x - b_dec) + b_enc),   out = W_dec a + b_dec

W_enc is [d, d_sae], W_dec [d_sae, d]; `act_name` says the site, mostly attn.hook_z with all heads side by side. They
were trained on a model as TransformerLens loads it, where the heads' value biases b_V are moved into the bias that
follows. Attention weights sum to 1, so in the model itself each such activation is larger by the constant b_V. Of other
sites, the residual stream and what is written to it lack their mean over components where the model has layer norms,
and N takes it out of a raw activation.
"""

import logging

from torch import Tensor

from sae.coder.spec import CoderSpec
from sae.formats._specs import released_spec
from sae.formats._transformer_lens import centering
from sae.lm.site import Site
from sae.lm.sites import model_id
from sae.selection.relu import ReLU
from sae.untrusted.configs import as_int
from sae.untrusted.places import Place

log = logging.getLogger(__name__)

WEIGHTS = r".+\.pt"
FIELDS = {"act_name", "act_size", "dict_size"}


def detect(place: Place) -> bool:
    """Returns whether the config of that file names an activation, its size and that of the dictionary."""
    return place.config(_config(place)).keys() >= FIELDS


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors); logs a warning about the value biases that the model must not have."""
    config, found = place.config(_config(place)), place.tensors()
    d_in = as_int(config["act_size"], "act_size", place)
    d_sae = as_int(config["dict_size"], "dict_size", place)
    tensors = {
        "W_enc": found.take("W_enc", d_in, d_sae).T,
        "b_enc": found.take("b_enc", d_sae),
        "W_dec": found.take("W_dec", d_sae, d_in),
        "b_dec": found.take("b_dec", d_in),
    }
    hook, model = str(config["act_name"]), str(config.get("model_name") or "")
    if hook.endswith("hook_z"):
        log.warning(
            "%s: trained on activations without the heads' value biases (TransformerLens moves them on); those of the "
            "model itself are larger by the constant b_V at %s, which neither latents nor errors account for",
            place,
            hook,
        )
    sites = (Site(hook, model=place.hints.model or model_id(model)),)
    spec = released_spec(
        (d_in, d_in, d_sae),
        ReLU(),
        (sites, sites),
        normalization=centering(place, hook, model),
        context_length=as_int(config.get("seq_len") or 0, "seq_len", place),
    )
    return spec, tensors


def _config(place: Place) -> str:
    return place.name.removesuffix(".pt") + "_cfg.json"
