"""Transcoders of Dunefsky and Chlenski (2406.11944): a pickle {cfg, state_dict}, in a .pt or .pkl.gz file.

    a = ReLU(W_enc (x - b_dec) + b_enc),   out = W_dec a + b_dec_out

W_enc is [d_in, d_sae], b_dec [d_in], W_dec [d_sae, d_out], b_dec_out [d_out]. Their trainer also saves autoencoders,
which have no b_dec_out and add b_dec. `cfg` is an object of a class in `sae_training.config`, whose fields are read
without that package: hook_point and out_hook_point, model_name, context_size. They read a model as TransformerLens
loads it: where that has layer norms, the residual stream and what is written to it lack their mean over components.
N of an autoencoder takes it out of a raw activation; a transcoder cannot know that of its output, and has none there.
"""

import logging
from typing import Any

from torch import Tensor

from sae.base.errors import ConfigError, DataError
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.formats._specs import released_spec
from sae.formats._transformer_lens import centering, hinted_pair
from sae.lm.site import Site
from sae.lm.sites import model_id
from sae.selection.relu import ReLU
from sae.untrusted.configs import as_int
from sae.untrusted.pickles import Inert, read_pickle
from sae.untrusted.places import Place
from sae.untrusted.weights import flatten, verify

log = logging.getLogger(__name__)

WEIGHTS = r".+\.(pt|pkl\.gz)"
PACKAGE = ("sae_training.",)


def detect(place: Place) -> bool:
    """Returns whether the pickle holds a config and a state dict."""
    try:
        return _is_pair(read_pickle(place.path(place.name), PACKAGE))
    except DataError:  # someone else's
        return False


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors)."""
    path = place.path(place.name)
    if not place.lazy:
        verify(path)
    pair = read_pickle(path, PACKAGE)
    if not _is_pair(pair):
        raise DataError(f"{place}: expected a cfg of a class of sae_training and a state_dict")
    config, found = vars(pair["cfg"]), place.as_tensors(flatten(pair["state_dict"]))
    transcodes = bool(config.get("is_transcoder", False))
    d_sae, d_in = found["b_enc"].numel(), found["b_dec"].numel()
    written = "b_dec_out" if transcodes else "b_dec"
    d_out = found[written].numel()
    tensors = {
        "W_enc": found.take("W_enc", d_in, d_sae).T,
        "b_enc": found.take("b_enc", d_sae),
        "W_dec": found.take("W_dec", d_sae, d_out),
        "b_dec": found.take(written, d_out),
    }
    if transcodes:
        tensors["b_pre"] = found.take("b_dec", d_in)
    reads, writes = _sites(place, config, transcodes)
    target = str(config.get("out_hook_point" if transcodes else "hook_point"))
    normalization = centering(place, target, str(config.get("model_name") or ""))
    if normalization.per_token and transcodes:
        log.warning(
            "%s: trained on outputs without their mean over components (TransformerLens centers what is written to the "
            "stream); what the model itself writes at %s has one, which errors include",
            place,
            target,
        )
    spec = released_spec(
        (d_in, d_out, d_sae),
        ReLU(),
        (reads, writes),
        pre_bias="own" if transcodes else "decoder",
        normalization=Normalization() if transcodes else normalization,
        context_length=as_int(config.get("context_size") or 0, "cfg.context_size", place),
        training={"dataset": config.get("dataset_path")},
    )
    return spec, tensors


def _is_pair(pair: Any) -> bool:
    parts = (pair.get("cfg"), pair.get("state_dict")) if isinstance(pair, dict) else (None, None)
    return isinstance(parts[0], Inert) and isinstance(parts[1], dict)


def _sites(place: Place, config: dict[str, Any], transcodes: bool) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    if config.get("hook_point_head_index") is not None:
        raise ConfigError(f"hook_point_head_index: {place} reads one head; only whole activations are read here")
    model = place.hints.model or model_id(str(config.get("model_name") or ""))
    read, written = config.get("hook_point"), config.get("out_hook_point" if transcodes else "hook_point")
    if isinstance(read, str) and isinstance(written, str) and read and written:
        return (Site(read, model=model),), (Site(written, model=model),)
    if transcodes:
        return hinted_pair(place, model)
    return (), ()
