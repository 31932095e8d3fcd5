"""Llama Scope (2410.20526): a folder Llama3_1-8B-Base-L15R-8x with `hyperparams.json` and `checkpoints/*.safetensors`.

Stored are Linear layers, trained on inputs and outputs scaled to a mean norm of sqrt(d). The authors load them so
(their repository at the end of 2024, `sae.py`), and this is the coder whose latents they publish:

    1. b_enc / s_in,  b_dec / s_out,  W_dec s_in / s_out        s = sqrt(d) / dataset_average_activation_norm
    2. with sparsity_include_decoder_norm, n_i = |W_dec_i|:     W_dec_i / n_i,  W_enc_i n_i,  b_enc_i n_i
    3. a = h 1[h > jump_relu_threshold],  h = (x [- b_dec]) W_enc^T + b_enc,  out = a W_dec + b_dec

One threshold serves all latents, in raw units of h as it is after the first two steps; `topk` becomes JumpReLU too if
there is one. The decoders that were released are not of unit norm. Of transcoders, in and out differ.

A gated encoder (`use_glu_encoder`) is h sigmoid(y W_glu^T + b_glu): step 2 acts on h alone, since the gate has no
units. In step 1 the authors leave the gate as it is, though it was trained on scaled inputs, and subtract the pre-bias
of a transcoder in units of its output: there, what they load is not what they trained, and it is refused. None such
was released.
"""

from typing import Any

import torch
from torch import Tensor

from sae.base.errors import ConfigError, DataError
from sae.coder import folds
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.formats._specs import released_spec
from sae.formats.openmoss import linear_tensors, model_of, required_hook, token_wise_normalization
from sae.lm.site import Site
from sae.selection import Selection
from sae.selection.jumprelu import JumpReLU
from sae.selection.relu import ReLU
from sae.selection.topk import TopK
from sae.untrusted.configs import as_flag, as_int, one_of
from sae.untrusted.places import Place

CONFIG = "../hyperparams.json"
WEIGHTS = r"(final|pruned)\.safetensors"
NORMS = ("dataset-wise", "token-wise", "batch-wise", "inference", "none")


def detect(place: Place) -> bool:
    """Returns whether the config above the checkpoints is one of theirs."""
    return {"act_fn", "norm_activation", "hook_point_in"} <= place.config(CONFIG).keys()


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors)."""
    config, found = place.config(CONFIG), place.tensors()
    d = as_int(config.get("d_model"), "d_model", place)
    ins, outs = [required_hook(config, "hook_point_in", place)], [required_hook(config, "hook_point_out", place)]
    tensors = {name: tensor.float() for name, tensor in linear_tensors(place, config, found, d).items()}
    biased = as_flag(config, "apply_decoder_bias_to_pre_encoder", place) and as_flag(config, "use_decoder_bias", place)
    normalization, s_in, s_out = _scaled(place, config, d, ins, outs)
    if "W_glu" in tensors and s_in != 1:
        raise ConfigError(
            f"use_glu_encoder: true, but {place} was trained on inputs scaled by {s_in:g}, and its authors load the "
            "gate without that factor; which latents are meant is not certain"
        )
    if biased and s_in != s_out:
        raise ConfigError(
            f"apply_decoder_bias_to_pre_encoder: true, but {place} was trained on inputs scaled by {s_in:g}, and its "
            f"authors load the bias with the outputs' {s_out:g}; which latents are meant is not certain"
        )
    tensors["b_enc"] = tensors["b_enc"] / s_in
    tensors["b_dec"] = tensors["b_dec"] / s_out
    tensors["W_dec"] = tensors["W_dec"] * (s_in / s_out)
    selection, threshold = _selection(place, config)
    reads, writes = ((Site(name, model=model_of(place), width=d),) for (name,) in (ins, outs))
    spec = released_spec(
        (d, d, len(tensors["b_enc"])),
        selection,
        (reads, writes),
        encoder="glu" if "W_glu" in tensors else "linear",
        pre_bias="decoder" if biased else "none",
        normalization=normalization,
        context_length=1024,
    )
    if as_flag(config, "sparsity_include_decoder_norm", place, None):
        spec, tensors = folds.rescale_latents(spec, tensors, tensors["W_dec"].norm(dim=1).clamp_min(1e-8))
    if threshold is not None:
        tensors["threshold"] = torch.full((spec.d_sae,), threshold)
    return spec, tensors


def _scaled(
    place: Place, config: dict[str, Any], d: int, ins: list[str], outs: list[str]
) -> tuple[Normalization, float, float]:
    """Returns what is left of the normalization, and the factors on inputs and outputs that the tensors take up."""
    kind = one_of(config["norm_activation"], NORMS, "norm_activation", place)
    if kind == "batch-wise":
        raise ConfigError(f"norm_activation: {place} is 'batch-wise', by which codes depend on the rest of the batch")
    if kind == "token-wise":
        return token_wise_normalization(place, ins, outs), 1.0, 1.0
    if kind != "dataset-wise":
        return Normalization(), 1.0, 1.0
    said = config.get("dataset_average_activation_norm")
    means = [said.get(side) for side in ("in", "out")] if isinstance(said, dict) else [None]
    if not all(isinstance(mean, int | float) and not isinstance(mean, bool) and mean > 0 for mean in means):
        raise DataError(f"{place}: dataset_average_activation_norm is {said!r}, expected positive numbers in and out")
    s_in, s_out = (d**0.5 / mean for mean in means)
    return Normalization(), s_in, s_out


def _selection(place: Place, config: dict[str, Any]) -> tuple[Selection, float | None]:
    """Returns the rule and its threshold, if it has one."""
    act = one_of(str(config["act_fn"]).lower(), ("relu", "topk", "jumprelu"), "act_fn", place)
    threshold = config.get("jump_relu_threshold")
    if act == "relu":
        return ReLU(), None
    if act == "topk" and not threshold:
        return TopK(as_int(config.get("top_k"), "top_k", place)), None
    if not (isinstance(threshold, int | float) and threshold >= 0):
        raise DataError(f"{place}: jump_relu_threshold is {threshold!r}, expected a number that is not negative")
    return JumpReLU(), float(threshold)
