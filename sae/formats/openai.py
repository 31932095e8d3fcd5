"""OpenAI's coders of GPT-2 small, versions 1 to 5: `{location}[_v4|_v5_32k|_v5_128k]/autoencoders/{layer}.pt`.

    TopK    y = (x - mean) / (std + 1e-5)     a = ReLU(TopK_k(W_enc (y - b) + b_enc))     out = (W_dec a + b) std + mean
    ReLU                                      a = ReLU(W_enc (x - b) + b_enc)             out = W_dec a + b

(Gao 2024, 2406.04093.) The file is a state dict: pre_bias b [d], encoder.weight [d_sae, d], latent_bias [d_sae],
decoder.weight [d, d_sae]; beside the tensors it says `activation`, and k and what follows it in
`activation_state_dict`. Mean and standard deviation, which divides by d - 1, are the token's own. They were trained on
GPT-2 as it is (no weight centered) in rows of 64 tokens. The location in the path says the site.
"""

import re

from torch import Tensor

from sae.base.errors import DataError
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.formats._specs import released_spec
from sae.lm.site import Site
from sae.selection.relu import ReLU
from sae.selection.topk import TopK
from sae.untrusted.configs import as_int, one_of
from sae.untrusted.pickles import read_pickle
from sae.untrusted.places import Place

WEIGHTS = r".+\.pt"
TENSORS = {"pre_bias", "encoder.weight", "latent_bias", "decoder.weight"}
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
HOOKS = {
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
    "mlp_post_act": "mlp.hook_post",
}
WHERE = re.compile(rf"(?:^|/)({'|'.join(HOOKS)})(?:_v\w+)?/autoencoders/(\d+)\.pt$")
MODEL, CONTEXT = "openai-community/gpt2", 64


def detect(place: Place) -> bool:
    """Returns whether the file holds the four tensors of such a coder."""
    try:
        return place.shapes().keys() >= TENSORS
    except DataError:  # someone else's
        return False


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors)."""
    found = place.tensors()
    d_in, d_sae = found["pre_bias"].numel(), found["latent_bias"].numel()
    tensors = {
        "W_enc": found.take("encoder.weight", d_sae, d_in),
        "b_enc": found.take("latent_bias", d_sae),
        "W_dec": found.take("decoder.weight", d_in, d_sae).T,
        "b_dec": found.take("pre_bias", d_in),
    }
    found.ignore(*STATISTICS)  # how often latents fired in training
    said = read_pickle(place.path(place.name))  # without a word on it, their own loader takes ReLU
    activation = one_of(said.get("activation", "ReLU"), ("ReLU", "TopK"), "activation", place)
    state = said.get("activation_state_dict") or {}
    one_of(state.get("postact_fn", "ReLU"), ("ReLU",), "activation_state_dict.postact_fn", place)
    top = activation == "TopK"
    sites = _sites(place)
    spec = released_spec(
        (d_in, d_in, d_sae),
        TopK(as_int(state.get("k"), "activation_state_dict.k", place)) if top else ReLU(),
        (sites, sites),
        normalization=Normalization("layer_norm", eps=1e-5, undo_eps=False) if top else Normalization(),
        context_length=CONTEXT,
    )
    return spec, tensors


def _sites(place: Place) -> tuple[Site, ...]:
    known = WHERE.search(place.identity)
    hook = f"blocks.{known[2]}.{HOOKS[known[1]]}" if known else ""
    return (Site(hook, model=place.hints.model or MODEL),) if hook else ()
