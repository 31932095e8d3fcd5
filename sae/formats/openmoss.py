"""OpenMOSS' Llamascopium, formerly lm_saes: a folder with `config.json` and `sae_weights.safetensors`.

    y = s_in x    h = y W_E + b_E [times sigmoid(y W_E_glu + b_E_glu)]
    a = act(h n) / n    out = (a W_D + b_D) / s_out

n_i is |W_D_i| with `sparsity_include_decoder_norm`, and 1 without. `norm_activation` says s: "dataset-wise" is sqrt(d)
over the mean norm of that hook, kept as a tensor `dataset_average_activation_norm.<hook>`; "inference" is 1; with
"token-wise" it is sqrt(d) over the norm of the token. `act_fn` is one of

    relu, topk, jumprelu        thresholds are stored as logarithms, and compared with h n
    batchtopk                   has no threshold: until it is calibrated, a token keeps its own top_k largest
    layertopk, batchlayertopk   of a clt: top_k among the latents of all layers together

and `sae_type` one of

    sae, matryoshka_sae   W_E [D, M], b_E [M], W_D [M, D], b_D [D]; a transcoder if its two hooks differ
    crosscoder            W_E [H, D, M], b_E [H, M], W_D [H, M, D], b_D [H, D]; h is summed over the hooks
    clt                   W_E [L, D, M], b_E [L, M], W_D.i [i + 1, M, D] of all sources into layer i, b_D.i [D]; n is
                          taken over all the layers that a latent writes to
    lorsa, molt           refused: attention, and sums of linear maps, are no coders of activations

A crosscoder's n is that of each hook, so that a latent may pass its threshold at one hook and not at another. Here it
has one value for all: read are those with the same n at all hooks, and those with relu, where n does not matter.

Until 2025 an `sae` was Linear layers (encoder, decoder, encoder_glu), which might subtract the decoder's bias from y.
Llama Scope R1-Distill is of that kind.
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from sae.base.errors import ConfigError, DataError
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.formats._specs import released_spec
from sae.lm.site import Site
from sae.selection import Selection
from sae.selection.jumprelu import JumpReLU
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.topk import TopK
from sae.untrusted.configs import as_flag, as_int, one_of
from sae.untrusted.places import Place
from sae.untrusted.tensors import Tensors

log = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = r"sae_weights\.safetensors"
REFUSED = {
    "lorsa": "a sparse attention layer, whose latents at a token depend on the tokens before it",
    "molt": "a mixture of linear transforms, whose latents are matrices",
}
TYPES = ("sae", "matryoshka_sae", "crosscoder", "clt", *REFUSED)
NORMS = ("dataset-wise", "inference", "token-wise", "batch-wise")
NORM = "dataset_average_activation_norm."
ACTIVATIONS, OF_LAYERS = ("relu", "jumprelu", "topk", "batchtopk"), ("layertopk", "batchlayertopk")
THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
MODELS = {
    "Llama3_1-8B-Base": "meta-llama/Llama-3.1-8B",
    "Llama-Scope-R1-Distill": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}
LARGEST = torch.finfo(torch.float32).max
Coded = dict[str, Tensor]


def detect(place: Place) -> bool:
    """Returns whether the config beside the weights is one of Llamascopium's; SAELens' has another name."""
    return {"act_fn", "norm_activation", "d_model"} <= place.config(CONFIG).keys()


def read(place: Place) -> tuple[CoderSpec, Coded]:
    """Returns (spec, tensors)."""
    config = place.config(CONFIG)
    kind = one_of(config.get("sae_type", "sae"), TYPES, "sae_type", place)
    if kind in REFUSED:
        raise ConfigError(f"sae_type: {place} is {kind}, {REFUSED[kind]}; a coder maps each activation by itself")
    known = (*ACTIVATIONS, *(OF_LAYERS if kind == "clt" else ()))
    act = one_of(str(config["act_fn"]).lower(), known, "act_fn", place)
    d, found, pre_bias = as_int(config["d_model"], "d_model", place), place.tensors(), "none"
    if kind == "crosscoder":
        ins = outs = _hooks(config, "hook_points", place)
        tensors, norms = _crosscoder(place, config, act, found, d, len(ins))
    elif kind == "clt":
        ins, outs = _hooks(config, "hook_points_in", place), _hooks(config, "hook_points_out", place)
        tensors, norms = _cross_layer(found, d, len(ins))
    else:
        ins, outs = [required_hook(config, "hook_point_in", place)], [required_hook(config, "hook_point_out", place)]
        layout = linear_tensors if "encoder.weight" in found else _plain
        tensors = layout(place, config, found, d)
        norms, pre_bias = tensors["W_dec"].float().norm(dim=1), _pre_bias(place, config, found)
    included = as_flag(config, "sparsity_include_decoder_norm", place, None)
    if act == "jumprelu":
        shape = (len(ins), len(norms) // len(ins)) if kind == "clt" else (len(norms),)
        name = next((name for name in THRESHOLDS if name in found), THRESHOLDS[0])
        threshold = found.take(name, *shape).float().exp().flatten()
        tensors["threshold"] = (threshold / norms).clamp_max(LARGEST) if included else threshold
    selection = _selection(place, config, act, len(ins) if act in OF_LAYERS else 1)
    normalization, reads, writes = _normalized(place, config, found, d, ins, outs)
    spec = released_spec(
        (d * len(ins), d * len(outs), len(tensors["b_enc"])),
        selection,
        (reads, writes),
        encoder="glu" if "W_glu" in tensors else "linear",
        pre_bias=pre_bias,
        normalization=normalization,
        cross_layer=kind == "clt",
        budget="shared" if act in OF_LAYERS else "block",
        select_by_decoder_norm=included and "topk" in act,
        training={"sae_type": kind, "act_fn": act},
    )
    return spec, tensors


def required_hook(config: dict[str, Any], name: str, place: Place) -> str:
    """Returns the hook that a config names; DataError names the field if it names none."""
    if not isinstance(config.get(name), str):
        raise DataError(f"{place}: {name} is {config.get(name)!r}, expected the name of a hook")
    return config[name]


def model_of(place: Place) -> str:
    """Returns the model that the user or the name of the repository says; "" if neither does."""
    named = (model for name, model in MODELS.items() if name in place.identity)
    return place.hints.model or next(named, "")


def linear_tensors(place: Place, config: dict[str, Any], found: Tensors, d: int) -> Coded:
    """Returns the tensors of Linear layers: encoder, decoder and, where the config has one, encoder_glu."""
    m = found["encoder.bias"].numel()
    names = {"W_enc": ("encoder.weight", m, d), "b_enc": ("encoder.bias", m)}
    if as_flag(config, "use_glu_encoder", place):
        names |= {"W_glu": ("encoder_glu.weight", m, d), "b_glu": ("encoder_glu.bias", m)}
    tensors = {name: found.take(*stored) for name, stored in names.items()}
    tensors["W_dec"] = found.take("decoder.weight", d, m).T
    biased = as_flag(config, "use_decoder_bias", place, None)
    return tensors | {"b_dec": found.take("decoder.bias", d) if biased else torch.zeros(d)}


def token_wise_normalization(place: Place, ins: list[str], outs: list[str]) -> Normalization:
    """Returns the normalization by the norm of each token: exactly that, for a coder of the sites that it writes."""
    if ins != outs:
        raise ConfigError(
            f"norm_activation: {place} is 'token-wise', and its output is undone with the norms of {', '.join(outs)} "
            "themselves, which a coder is to predict"
        )
    return Normalization("l2", eps=0.0)


def _hooks(config: dict[str, Any], name: str, place: Place) -> list[str]:
    found = config.get(name)
    if not (isinstance(found, list) and found and all(isinstance(hook, str) for hook in found)):
        raise DataError(f"{place}: {name} is {found!r}, expected a list of hooks")
    return found


def _plain(place: Place, config: dict[str, Any], found: Tensors, d: int) -> Coded:
    m = found["b_E"].numel()
    tensors = {"W_enc": found.take("W_E", d, m).T, "b_enc": found.take("b_E", m), "W_dec": found.take("W_D", m, d)}
    if as_flag(config, "use_glu_encoder", place):
        tensors |= {"W_glu": found.take("W_E_glu", d, m).T, "b_glu": found.take("b_E_glu", m)}
    biased = as_flag(config, "use_decoder_bias", place, None)
    return tensors | {"b_dec": found.take("b_D", d) if biased else torch.zeros(d)}


def _crosscoder(place: Place, config: dict[str, Any], act: str, found: Tensors, d: int, n: int) -> tuple[Coded, Tensor]:
    """Returns the tensors with the columns of the hooks side by side, and the decoder norms of one hook.

    ConfigError if those of another differ and matter: then latents do not fire at all hooks together.
    """
    m = found["b_E"].shape[-1]
    W_D = found.take("W_D", n, m, d)
    norms = W_D.float().norm(dim=2)
    if not as_flag(config, "sparsity_include_decoder_norm", place, None):
        raise ConfigError(f"sparsity_include_decoder_norm: false, but {place} is a crosscoder, which has it always")
    if act != "relu" and not torch.allclose(norms, norms[0].expand_as(norms), rtol=1e-5, atol=0):
        raise ConfigError(
            f"act_fn: {place} is a crosscoder with {act!r}, which compares a latent times its decoder's "
            "norm at each hook, so that it may fire at one and not at another; here a latent has one value for all"
        )
    tensors = {
        "W_enc": found.take("W_E", n, d, m).permute(2, 0, 1).reshape(m, n * d),
        "b_enc": found.take("b_E", n, m).float().sum(0),
        "W_dec": W_D.permute(1, 0, 2).reshape(m, n * d),
        "b_dec": found.take("b_D", n, d).reshape(n * d),
    }
    return tensors, norms[0]


def _cross_layer(found: Tensors, d: int, n: int) -> tuple[Coded, Tensor]:
    """Returns the tensors layer by layer, decoders by what they come from, and the norm of every latent's decoder."""
    m = found["b_E"].shape[-1]
    into = [found.take(f"W_D.{layer}", layer + 1, m, d) for layer in range(n)]
    rows = [torch.stack([into[to][layer] for to in range(layer, n)], dim=1) for layer in range(n)]  # [m, n - layer, d]
    tensors = {
        "W_enc": found.take("W_E", n, d, m).transpose(1, 2).reshape(n * m, d),
        "b_enc": found.take("b_E", n, m).reshape(n * m),
        "W_dec": torch.cat([part.reshape(-1, d) for part in rows]),
        "b_dec": torch.cat([found.take(f"b_D.{layer}", d) for layer in range(n)]),
    }
    return tensors, torch.cat([part.float().flatten(1).norm(dim=1) for part in rows])


def _pre_bias(place: Place, config: dict[str, Any], found: Tensors) -> str:
    if not (as_flag(config, "apply_decoder_bias_to_pre_encoder", place) and config["use_decoder_bias"]):
        return "none"
    if "encoder.weight" not in found:
        raise ConfigError(
            f"apply_decoder_bias_to_pre_encoder: true, but the encoder of {place} is of a version that never did that"
        )
    return "decoder"


def _selection(place: Place, config: dict[str, Any], act: str, sharing: int) -> Selection:
    """Returns the rule; `sharing` is how many layers share the budget that the config gives."""
    if act == "relu":
        return ReLU()
    if act == "jumprelu":
        return JumpReLU()
    k = as_int(config.get("top_k"), "top_k", place)
    if k % sharing:
        raise ConfigError(f"top_k: {place} keeps {k} of all layers together, which {sharing} do not share equally")
    if not act.startswith("batch"):
        return TopK(k // sharing)
    log.warning("%s: act_fn %s has no threshold, so each token keeps its own top_k largest", place, act)
    return MutualChoice(k // sharing)


def _normalized(
    place: Place, config: dict[str, Any], found: Tensors, d: int, ins: list[str], outs: list[str]
) -> tuple[Normalization, tuple[Site, ...], tuple[Site, ...]]:
    """Returns the normalization and the sites, each with its factor."""
    kind, model = one_of(config["norm_activation"], NORMS, "norm_activation", place), model_of(place)
    if kind == "batch-wise":
        raise ConfigError(f"norm_activation: {place} is 'batch-wise', by which codes depend on the rest of the batch")
    hook_points = list(dict.fromkeys([*ins, *outs]))
    scales, normalization = dict.fromkeys(hook_points, 1.0), Normalization()
    if kind != "dataset-wise":  # the tensors are written all the same, without a value
        found.ignore(*(NORM + hook for hook in hook_points))
        normalization = token_wise_normalization(place, ins, outs) if kind == "token-wise" else Normalization()
    elif len(hook_points) == 1:
        normalization = Normalization("scalar", _scale(place, found, d, ins[0]))
    else:
        normalization, scales = Normalization("scalar"), {hook: _factor(found, d, hook) for hook in hook_points}
    reads, writes = (
        tuple(Site(hook, model=model, width=d, scale=scales[hook]) for hook in side) for side in (ins, outs)
    )
    return normalization, reads, writes


def _scale(place: Place, found: Tensors, d: int, hook: str) -> float:
    """Returns the factor of the only site: it has been published without, too."""
    if NORM + hook in found:
        return _factor(found, d, hook)
    return float(
        place.required_hint("scale", f"it was trained on inputs scaled by sqrt({d}) / E|x|", f"sqrt({d}) / E|x|")
    )


def _factor(found: Tensors, d: int, hook: str) -> float:
    mean = found.number(NORM + hook)
    if not mean > 0:
        raise DataError(f"{found.source}: tensor {NORM + hook} is {mean}, expected the mean norm of activations")
    return math.sqrt(d) / mean
