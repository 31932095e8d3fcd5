"""SAELens: a folder with `cfg.json` and `sae_weights.safetensors`, as its versions 3 to 6 save it.

    standard, transcoder, skip_transcoder     a = ReLU(h)            (skip: + x W_skip^T)
    topk, abstopk                             k largest h (|h|); with rescale_acts_by_decoder_norm, of h n, and a = h n
    jumprelu (batchtopk is saved so)          a = ReLU(h) 1[h > threshold]
    gated                                     1[y W_enc + b_gate > 0] ReLU(y (W_enc exp(r_mag)) + b_mag)
    matching_pursuit                          `sae/selection/matching_pursuit.py`

W_enc is stored as [d_in, d_sae]. Configs from before version 6 name things differently, and say TopK only by
`activation_fn`. Checkpoints of training hold the cut of BatchTopK (`topk_threshold`) or `log_threshold`, and what was
done to the inputs in files beside the weights. Temporal coders are told apart, and refused: they look at the context.
"""

from typing import Any

import torch
from torch import Tensor

from sae import folds
from sae.errors import ConfigError, DataError
from sae.normalization import Normalization
from sae.places import Place, Tensors, as_int, one_of
from sae.selection import Selection
from sae.selection.gated import Gated
from sae.selection.jumprelu import JumpReLU
from sae.selection.matching_pursuit import MatchingPursuit
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK
from sae.sites import model_id
from sae.spec import CoderSpec, Site

WEIGHTS = r"sae_weights\.safetensors"
CONFIG = "cfg.json"
OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
NORMALIZATIONS = {
    "none": Normalization(),
    "layer_norm": Normalization("layer_norm", eps=1e-5, undo_eps=False),
    "constant_norm_rescale": Normalization("l2", eps=0.0),
}
BATCH = ("batchtopk", "matryoshka_batchtopk")
ARCHITECTURES = (
    *("standard", "gated", "topk", "jumprelu", "abstopk", "matching_pursuit", *BATCH),
    *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder", "temporal"),
)


def detect(place: Place) -> bool:
    """Returns whether the config beside the weights is one of SAELens'."""
    config = place.config(CONFIG)
    return bool({"architecture", "hook_name", "hook_point", "metadata", "activation_fn_str"} & config.keys())


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors)."""
    config = migrated(place.config(CONFIG))
    architecture = one_of(config["architecture"], ARCHITECTURES, "architecture", place)
    if architecture == "temporal":
        raise ConfigError(
            f"architecture: {place} is a temporal SAE, whose codes depend on the whole context by attention; a coder "
            "here maps each activation by itself"
        )
    found = place.tensors()
    d_in, d_sae = as_int(config["d_in"], "d_in", place), as_int(config["d_sae"], "d_sae", place)
    transcodes = "transcoder" in architecture
    d_out = as_int(config.get("d_out", d_in), "d_out", place)
    pre_bias = "decoder" if not transcodes and config.get("apply_b_dec_to_input") else "none"
    reads, writes = _sites(place, config.get("metadata", {}), transcodes)
    tensors = {"W_dec": found.take("W_dec", d_sae, d_out), "b_dec": found.take("b_dec", d_out)}
    if architecture == "matching_pursuit":
        found.ignore("W_enc", "b_enc")
        tensors |= {"W_enc": tensors["W_dec"], "b_enc": tensors["W_dec"].new_zeros(d_sae)}
        if pre_bias == "none":  # SAELens adds the bias only where it subtracts it
            tensors["b_dec"] = torch.zeros_like(tensors["b_dec"])
    else:
        tensors["W_enc"] = found.take("W_enc", d_in, d_sae).T
        tensors["b_enc"] = found.take("b_gate" if architecture == "gated" else "b_enc", d_sae)
    selection = _selection(place, config, architecture, found, tensors, d_sae)
    if "skip" in architecture:
        tensors["W_skip"] = found.take("W_skip", d_out, d_in)
    _finetuned(config, found, tensors, place)
    metadata = config.get("metadata", {})
    spec = CoderSpec(
        d_in,
        d_out,
        d_sae,
        selection,
        reads,
        writes,
        encoder="matching_pursuit" if architecture == "matching_pursuit" else "linear",
        pre_bias=pre_bias,
        decoder_norm="free",
        skip="skip" in architecture,
        context_length=as_int(metadata.get("context_size") or 0, "context_size", place),
        bos="row" if metadata.get("prepend_bos", True) else "none",
        training={"architecture": architecture, "dataset": metadata.get("dataset_path")},
    )
    if config.get("rescale_acts_by_decoder_norm"):  # its latents are h n: the same coder with a unit decoder
        spec, tensors = folds.rescale_latents(spec, tensors, tensors["W_dec"].float().norm(dim=1).clamp_min(1e-8))
    return _normalized(place, config["normalize_activations"], spec, tensors)


def migrated(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config in the terms of version 6, with every default that bears on the map."""
    new = {OLD_NAMES.get(name, name): value for name, value in config.items()}
    version = str(new.get("sae_lens_version") or new.get("metadata", {}).get("sae_lens_version") or "0")
    if version.split(".")[0].isdigit() and int(version.split(".")[0]) < 6:
        kwargs = new.get("activation_fn_kwargs") or {}
        new.setdefault("apply_b_dec_to_input", True)
        new.setdefault("architecture", "standard")
        if str(new.get("activation_fn")).startswith("topk"):
            new |= {"architecture": "topk", "k": kwargs.get("k", new.get("k"))}
        elif new.get("activation_fn", "relu") not in ("relu", None):
            raise ConfigError(f"activation_fn: {new['activation_fn']!r} is not known; known are relu and topk")
        new["metadata"] = {"prepend_bos": True, **new, **new.get("metadata", {})}
    said = new.get("normalize_activations")
    if said is None or isinstance(said, bool):
        new["normalize_activations"] = "expected_average_only_in" if said else "none"
    new.setdefault("architecture", "standard")
    return new


def _selection(
    place: Place, config: dict[str, Any], architecture: str, found: Tensors, tensors: dict[str, Tensor], d_sae: int
) -> Selection:
    """Returns the rule, and puts its own tensors beside the others."""
    if architecture in ("topk", "abstopk"):
        k = as_int(config.get("k"), "k", place)
        return TopK(k) if architecture == "topk" else SignedTopK(k)
    if architecture in BATCH:
        cut = found.number("topk_threshold")
        if not cut > 0:
            return MutualChoice(as_int(config.get("k"), "k", place))
        tensors["threshold"] = torch.full((d_sae,), cut)
        return JumpReLU()
    if architecture.startswith("jumprelu"):
        older = "log_threshold" in found
        tensors["threshold"] = found.take("log_threshold", d_sae).exp() if older else found.take("threshold", d_sae)
        return JumpReLU()
    if architecture == "gated":
        tensors |= {"r_mag": found.take("r_mag", d_sae), "b_mag": found.take("b_mag", d_sae)}
        return Gated()
    if architecture == "matching_pursuit":
        names = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
        return MatchingPursuit(**{name: config[name] for name in names if name in config})
    return ReLU()


def _finetuned(config: dict[str, Any], found: Tensors, tensors: dict[str, Tensor], place: Place) -> None:
    """Applies factors on the latents before the decoder, which were fine-tuned; for a time all files held ones."""
    if "scaling_factor" not in found:
        return
    factor = found.take("scaling_factor", len(tensors["W_dec"])).float()
    if torch.allclose(factor, torch.ones_like(factor)):
        return
    if not config.get("finetuning_scaling_factor"):
        raise DataError(
            f"{place}: tensor scaling_factor is not all ones, but the config has no finetuning_scaling_factor"
        )
    tensors["W_dec"] = tensors["W_dec"].float() * factor[:, None]


def _normalized(
    place: Place, kind: str, spec: CoderSpec, tensors: dict[str, Tensor]
) -> tuple[CoderSpec, dict[str, Tensor]]:
    known = (*NORMALIZATIONS, "expected_average_only_in", "covariance_whitening")
    one_of(kind, known, "normalize_activations", place)
    if kind == "covariance_whitening":  # a checkpoint of training: inference files have it folded
        if not place.has("activation_whitening.safetensors"):
            raise DataError(
                f"{place}: trained on whitened inputs, but activation_whitening.safetensors is not beside it"
            )
        how = place.tensors("activation_whitening.safetensors")
        shape = (spec.d_in, spec.d_in)
        return folds.whitening(
            spec, tensors, how.take("mean", spec.d_in), how.take("matrix", *shape), how.take("inverse_matrix", *shape)
        )
    normalization = NORMALIZATIONS.get(kind)
    if normalization is None:
        scale = place.config("activation_scaler.json").get("scaling_factor") or place.hints.scale
        why = "it was trained on inputs scaled to a mean norm of sqrt(d_in)"
        scale = scale or place.need("scale", why, "sqrt(d_in) / E|x|")
        normalization = Normalization("scalar", float(scale))
    return spec.with_(normalization=normalization), tensors


def _sites(place: Place, metadata: dict[str, Any], transcodes: bool) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    hook, written = metadata.get("hook_name"), metadata.get("hook_name_out")
    model = place.hints.model or model_id(metadata.get("model_name") or "")
    if not hook or (transcodes and not written):
        return (), ()
    if metadata.get("hook_head_index") is not None:
        raise ConfigError(f"hook_head_index: {place} reads one head of {hook}; only whole activations are read here")
    reads = (Site(hook, model=model),)
    return reads, (Site(written, model=model),) if transcodes else reads
