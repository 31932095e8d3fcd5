"""SAELens: a folder with `cfg.json` and `sae_weights.safetensors`, as its versions 3 to 6 save it.

    standard, transcoder, skip_transcoder     a = ReLU(h)            (skip: + x W_skip^T)
    topk, abstopk                             k largest h (|h|); with rescale_acts_by_decoder_norm, of h n, and a = h n
    jumprelu (batchtopk is saved so)          a = ReLU(h) 1[h > threshold]
    gated                                     1[y W_enc + b_gate > 0] ReLU(y (W_enc exp(r_mag)) + b_mag)
    matching_pursuit                          `sae/selection/matching_pursuit.py`

W_enc is stored as [d_in, d_sae]; n are the norms of W_dec's rows. Configs from before version 6 name things
differently, and say TopK only by `activation_fn`. Checkpoints of training hold the cut of BatchTopK
(`topk_threshold`) or `log_threshold`, and what was done to the inputs in files beside the weights. Temporal coders are
told apart, and refused: they look at the context. A transcoder's output is of another site: what normalizes its input
token by token is not undone.

Activations are those of a TransformerLens model loaded without processing, plus `model_from_pretrained_kwargs`. Where
these center the weights that write to the residual stream, what is read there lacks its mean over components, and N
takes it out of a raw activation. (RMSNorm's models are never centered; TransformerLens skips them.)
"""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.base.errors import ConfigError, DataError
from sae.base.files import save_tensors, write_json
from sae.coder import folds
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.formats._exporting import check_expressible, only, rule_of
from sae.formats._specs import released_spec
from sae.formats._transformer_lens import hinted_pair
from sae.formats.temporal import WHY
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.lm.sites import ALIAS, is_centered, model_id, on_stream
from sae.selection import Selection
from sae.selection.gated import Gated
from sae.selection.jumprelu import JumpReLU
from sae.selection.matching_pursuit import MatchingPursuit
from sae.selection.relu import ReLU
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK
from sae.untrusted.configs import as_int, one_of
from sae.untrusted.damage import printable
from sae.untrusted.places import Place
from sae.untrusted.tensors import Tensors, check_finite

log = logging.getLogger(__name__)

WEIGHTS = r"sae_weights\.safetensors"
CONFIG, FILE, SCALER, VERSION = "cfg.json", "sae_weights.safetensors", "activation_scaler.json", "6.54.12"
LIBRARY = "saelens"  # how the hub calls it
SNIPPET = 'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo}", "{folder}")'
OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
NUMBER, LARGEST = (int, float), 1e30
TYPES: dict[str, type | tuple[type, ...]] = {  # of what is read of a config, beside whole numbers
    **dict.fromkeys(("metadata", "model_from_pretrained_kwargs", "activation_fn_kwargs"), dict),
    **dict.fromkeys(("model_name", "hook_name", "hook_name_out", "activation_fn", "dataset_path"), str),
    **dict.fromkeys(("sae_lens_version", "sae_lens_training_version"), str),
    **dict.fromkeys(("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor"), bool),
    **dict.fromkeys(("prepend_bos", "stop_on_duplicate_support"), bool),
    **dict.fromkeys(("residual_threshold", "scaling_factor"), NUMBER),
    **{"seqpos_slice": list, "exclude_special_tokens": (bool, list)},
}
NORMALIZATIONS = {
    "none": Normalization(),
    "layer_norm": Normalization("layer_norm", eps=1e-5, undo_eps=False),
    "constant_norm_rescale": Normalization("l2", eps=0.0),
}
BATCH = ("batchtopk", "matryoshka_batchtopk")
CHOOSING = ("topk", "abstopk", *BATCH)
ARCHITECTURES = (
    *("standard", "gated", "topk", "jumprelu", "abstopk", "matching_pursuit", *BATCH),
    *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder", "temporal"),
)
SINCE_UNPROCESSED = (3, 19, 2)  # training before read models with TransformerLens' processing (SAELens#279)

KINDS = {"layer_norm": "layer_norm", "l2": "constant_norm_rescale"}  # our kinds of normalization in their words
UNIT = 1e-6  # how far from 1 the norm of a normalized decoder may be, in float32
RULES = {  # our rules by what they do in inference
    "relu": "standard",
    "topk": "topk",
    "gradient_topk": "topk",
    "signed_topk": "abstopk",
    "jumprelu": "jumprelu",
    "mutual_choice": "jumprelu",
    "feature_choice": "jumprelu",
    "gated": "gated",
    "matching_pursuit": "matching_pursuit",
}


def detect(place: Place) -> bool:
    """Returns whether the config beside the weights is one of SAELens'."""
    config = place.config(CONFIG)
    return bool({"architecture", "hook_name", "hook_point", "metadata", "activation_fn_str"} & config.keys())


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors)."""
    config = upgraded_config(place.config(CONFIG), place)
    architecture = one_of(config.get("architecture"), ARCHITECTURES, "architecture", place)
    if architecture == "temporal":
        raise ConfigError(f"architecture: {place} {WHY}")
    d_in, d_sae = (as_int(config.get(name), name, place) for name in ("d_in", "d_sae"))
    transcodes, subtracts = "transcoder" in architecture, config["apply_b_dec_to_input"]
    d_out = as_int(config.get("d_out"), "d_out", place) if transcodes else d_in
    if transcodes and subtracts:
        raise DataError(f"{place}: apply_b_dec_to_input is true, but a transcoder's decoder bias is of its output")
    one_of(config.get("reshape_activations", "none"), ("none", "hook_z"), "reshape_activations", place)
    found = place.tensors()
    tensors = {"W_dec": found.take("W_dec", d_sae, d_out), "b_dec": found.take("b_dec", d_out)}
    if architecture == "matching_pursuit":
        tensors |= {"W_enc": tensors["W_dec"], "b_enc": tensors["W_dec"].new_zeros(d_sae)}
        if not subtracts:  # SAELens adds the bias only where it subtracts it
            tensors["b_dec"] = torch.zeros_like(tensors["b_dec"])
    else:
        tensors["W_enc"] = found.take("W_enc", d_in, d_sae).T
        tensors["b_enc"] = found.take("b_gate" if architecture == "gated" else "b_enc", d_sae)
    if "skip" in architecture:
        tensors["W_skip"] = found.take("W_skip", d_out, d_in)
    _finetuned(config, found, tensors, place)
    rescales = config.get("rescale_acts_by_decoder_norm", False)
    if rescales and architecture not in CHOOSING:
        raise ConfigError(f"rescale_acts_by_decoder_norm: {place} has it, but {architecture!r} coders do not rescale")
    if rescales:  # its latents are h n, and its cut is of these: a unit decoder
        norms = tensors["W_dec"].float().norm(dim=1)
        tensors |= {"W_enc": tensors["W_enc"] * norms[:, None], "b_enc": tensors["b_enc"] * norms}
        tensors["W_dec"] = tensors["W_dec"] / torch.where(norms > 0, norms, 1.0)[:, None]
    selection, own = _selection(place, config, architecture, found, d_sae)
    metadata = config["metadata"]
    reads, writes = _sites(place, metadata, transcodes)
    spec = released_spec(
        (d_in, d_out, d_sae),
        selection,
        (reads, writes),
        encoder=selection.encoder or "linear",
        pre_bias="decoder" if subtracts else "none",
        skip="skip" in architecture,
        mask=_mask(place, metadata),
        context_length=as_int(metadata.get("context_size", 0), "context_size", place),
        bos="row" if metadata.get("prepend_bos", True) else "none",
        training={"architecture": architecture, "dataset": metadata.get("dataset_path")},
    )
    normalizes = place.hint("normalization") or config["normalize_activations"]
    spec, tensors = _normalized(place, normalizes, transcodes, spec, tensors | own)
    return _of_raw_activations(place, metadata, transcodes, spec, tensors)


def upgraded_config(config: dict[str, Any], source: object = CONFIG) -> dict[str, Any]:
    """Returns a config in the terms of version 6, with every default that bears on the map; DataError names a field."""
    new = _typed({OLD_NAMES.get(name, name): value for name, value in config.items()}, source)
    metadata = _typed(new.get("metadata", {}), source)
    if _version(metadata | new, "sae_lens_version") < (6, 0, 0):
        activation, kind = new.get("activation_fn", "relu"), new.setdefault("architecture", "standard")
        if one_of(activation, ("relu", "topk"), "activation_fn", source) == "topk":
            one_of(kind, ("standard", "topk"), "architecture, with activation_fn 'topk',", source)
            new |= {"architecture": "topk", "k": new.get("activation_fn_kwargs", {}).get("k", new.get("k"))}
        metadata = new | metadata
    if new.get("architecture", "standard") not in CHOOSING and (new.get("k") or new.get("activation_fn_kwargs")):
        what, kind = "k" if new.get("k") else "activation_fn_kwargs", printable(new.get("architecture", "standard"))
        raise DataError(f"{source}: {what} is given, but architecture {kind} has none")
    new.setdefault("apply_b_dec_to_input", "transcoder" not in str(new.get("architecture")))
    said = new.get("normalize_activations", False)
    normalizes = ("expected_average_only_in" if said else "none") if isinstance(said, bool) else said
    return {**new, "metadata": metadata, "normalize_activations": normalizes}


def _typed(config: dict[str, Any], source: object) -> dict[str, Any]:
    """Returns what a config says that is not null; DataError names a field whose value is of another type."""
    for name, value in config.items():
        allowed = TYPES.get(name)
        fits = value is None or not allowed or isinstance(value, allowed)
        if not fits or (allowed == NUMBER and value is not None and (value is True or not abs(value) < LARGEST)):
            raise DataError(f"{source}: {name} has a value of type {type(value).__name__} that it cannot have")
    return {name: value for name, value in config.items() if value is not None}


def _version(config: dict[str, Any], name: str) -> tuple[int, ...]:
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", config.get(name, ""))
    return tuple(map(int, found.groups())) if found else (0, 0, 0)


def _selection(
    place: Place, config: dict[str, Any], architecture: str, found: Tensors, d_sae: int
) -> tuple[Selection, dict[str, Tensor]]:
    """Returns the rule, and its own tensors."""
    if architecture in ("topk", "abstopk"):
        k = as_int(config.get("k"), "k", place)
        return (TopK(k) if architecture == "topk" else SignedTopK(k)), {}
    if architecture in BATCH:
        cut = found.number("topk_threshold")
        if not cut > 0:
            raise DataError(f"{place}: topk_threshold is {cut}: it was not trained yet, and no cut is known")
        return JumpReLU(), {"threshold": torch.full((d_sae,), cut)}
    if architecture.startswith("jumprelu"):
        older = "log_threshold" in found
        threshold = found.take("log_threshold", d_sae).exp() if older else found.take("threshold", d_sae)
        return JumpReLU(), {"threshold": threshold}
    if architecture == "gated":
        return Gated(), {name: found.take(name, d_sae) for name in ("r_mag", "b_mag")}
    if architecture == "matching_pursuit":
        rule = MatchingPursuit()  # whose defaults are theirs
        most = as_int(config["max_iterations"], "max_iterations", place) if "max_iterations" in config else None
        least = float(config.get("residual_threshold", rule.residual_threshold))
        return MatchingPursuit(least, most, config.get("stop_on_duplicate_support", True)), {}
    return ReLU(), {}


def _finetuned(config: dict[str, Any], found: Tensors, tensors: dict[str, Tensor], place: Place) -> None:
    """Applies factors on the latents before the decoder, which were fine-tuned; for a time all files held ones."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in found:
            factor = found.take(name, len(tensors["W_dec"])).float()
            if torch.allclose(factor, torch.ones_like(factor)):
                continue
            if not config.get("finetuning_scaling_factor"):
                raise DataError(f"{place}: tensor {name} is not all ones, but finetuning_scaling_factor is not set")
            tensors["W_dec"] = tensors["W_dec"].float() * factor[:, None]


def _normalized(
    place: Place, kind: str, transcodes: bool, spec: CoderSpec, tensors: dict[str, Tensor]
) -> tuple[CoderSpec, dict[str, Tensor]]:
    one_of(kind, (*NORMALIZATIONS, "expected_average_only_in", "covariance_whitening"), "normalize_activations", place)
    if kind == "covariance_whitening":  # a checkpoint of training: inference files have it folded
        name, d = "activation_whitening.safetensors", spec.d_in
        if not place.has(name):
            raise DataError(f"{place}: it is of whitened inputs, but {name} is not beside it")
        how = place.tensors(name)
        mean, matrix, inverse = how.take("mean", d), how.take("matrix", d, d), how.take("inverse_matrix", d, d)
        return folds.whitening(spec, tensors, mean, matrix, inverse)
    normalization = NORMALIZATIONS.get(kind)
    if transcodes and normalization and kind != "none":
        normalization = replace(normalization, undone=False)  # it stays of the input, as SAELens leaves it
    if normalization is None:
        scale = _typed(place.config(SCALER), f"{place.files.label}/{SCALER}").get("scaling_factor")
        why = "it was trained on inputs scaled to a mean norm of sqrt(d_in)"
        scale = place.required_hint("scale", why, "sqrt(d_in) / E|x|") if scale is None else scale
        normalization = Normalization("scalar", float(scale))
    return spec.with_(normalization=normalization), tensors


def _of_raw_activations(
    place: Place, metadata: dict[str, Any], transcodes: bool, spec: CoderSpec, tensors: dict[str, Tensor]
) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns the coder of raw activations, where its own are those of a processed TransformerLens model."""
    how = metadata.get("model_from_pretrained_kwargs", {})
    said = place.hint("processed")
    processed = how.get("center_writing_weights", False) if said is None else said
    hooks = [metadata[name] for name in ("hook_name", "hook_name_out")[: 1 + transcodes] if name in metadata]
    if (said or how.get("fold_value_biases")) and any(hook.endswith(("hook_z", "hook_v")) for hook in hooks):
        log.warning("%s is of heads without their value biases, which are not taken out of what it reads here", place)
    model = place.hints.model or metadata.get("model_name", "")
    if is_centered(model) is False or (hooks and not any(map(on_stream, hooks))):
        return spec, tensors
    if not processed:
        trained = _version(metadata, "sae_lens_training_version")
        if "center_writing_weights" not in how and said is None and (0, 0, 0) < trained < SINCE_UNPROCESSED:
            log.warning(
                "%s was trained by SAELens %s, which by default read models with centered weights, and does not say "
                "whether this one was; it reads raw activations here",
                place,
                ".".join(map(str, trained)),
            )
        return spec, tensors
    kind = spec.normalization.kind
    if transcodes or kind == "l2" or not hooks:
        what = "is a transcoder, and the mean of its output is not known" if transcodes else "does not say where"
        what = "is of inputs scaled by token" if kind == "l2" else what
        raise ConfigError(f"center_writing_weights: {place} reads a model with centered weights, but {what}")
    if kind == "layer_norm":  # it takes the mean out and puts it back by itself
        return spec, tensors
    spec, tensors = folds.scale(spec, tensors)
    return spec.with_(normalization=Normalization("center")), tensors


def _sites(place: Place, metadata: dict[str, Any], transcodes: bool) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    for name in ("hook_head_index", "hook_head_index_out"):
        if name in metadata:
            raise ConfigError(f"{name}: {place} is of one head; only whole activations are read here")
    hook, written = metadata.get("hook_name", ""), metadata.get("hook_name_out", "")
    model = place.hints.model or model_id(metadata.get("model_name", ""))
    if transcodes and not (hook and written):
        return hinted_pair(place, model)
    if not hook:
        return (), ()
    reads = (Site(hook, model=model),)
    return reads, (Site(written, model=model),) if transcodes else reads


def _mask(place: Place, metadata: dict[str, Any]) -> MaskSpec:
    positions, special = metadata.get("seqpos_slice", [None]), metadata.get("exclude_special_tokens")
    if not 1 <= len(positions) <= 3:
        raise DataError(f"{place}: seqpos_slice has {len(positions)} numbers, expected 1 to 3")
    first = slice(*positions).start or 0  # one number alone is where it stops
    tokens = [as_int(token, "exclude_special_tokens", place) for token in special] if isinstance(special, list) else []
    return MaskSpec(tuple(tokens), max(1, as_int(first, "seqpos_slice", place)))


def write(folder: Path, coder: SparseCoder) -> None:
    """Writes a coder that SAELens 6 loads with `SAE.load_from_disk`, whose latents and output are the same.

    A scale on the inputs is folded into the weights, as SAELens does itself. ConfigError names what it cannot say.
    """
    spec, tensors = coder.spec, {name: t.detach().float().cpu() for name, t in coder.state_dict().items()}
    check_finite(tensors, folder)
    config = _config(spec, tensors)
    if spec.normalization.kind == "scalar":
        spec, tensors = folds.scale(spec, tensors)
    if config["architecture"].startswith("jumprelu"):
        cut = tensors["threshold"] if "threshold" in tensors else torch.full((spec.d_sae,), spec.calibration[0])
        if spec.select_by_decoder_norm:  # it is one of h n
            cut = cut / tensors["W_dec"].norm(dim=1).clamp_min(1e-30)
        tensors["threshold"] = cut.clamp_max(torch.finfo(torch.float32).max)
    if spec.encoding.pursues:
        tensors = {name: tensors[name] for name in ("W_dec", "b_dec")}
    else:
        tensors["W_enc"] = tensors["W_enc"].T
    if config["architecture"] == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    save_tensors(folder / FILE, tensors)
    write_json(folder / CONFIG, config)  # last, so that a folder with a config is whole


def _config(spec: CoderSpec, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the config of a coder; ConfigError names what it cannot say."""
    transcodes, rule = not spec.is_autoencoder or spec.skip, spec.selection
    check_expressible(
        "SAELens",
        spec,
        encoder=("matching_pursuit",),
        pre_bias=() if transcodes else ("decoder",),
        normalization=[*([] if rule.encoder else ["scalar"]), *KINDS],
        selection=[name for name, kind in RULES.items() if not transcodes or kind in ("standard", "jumprelu")],
        select_by_decoder_norm=(True,),
        skip=(True,),
    )
    name, constants = rule_of(spec)
    kind, normalizes = RULES[name], KINDS.get(spec.normalization.kind, "none")
    top, wanted = kind in ("topk", "abstopk"), NORMALIZATIONS[normalizes]
    only("SAELens", "selection.inference", "gradient" if rule.looks_at_gradients else "plain", "plain")
    if normalizes != "none":
        only("SAELens", "normalization.undone", spec.normalization.undone, not transcodes)
        for field in ("eps", "unbiased", "undo_eps") if wanted.eps else ("eps",):
            only("SAELens", f"normalization.{field}", getattr(spec.normalization, field), getattr(wanted, field))
    if kind == "jumprelu" and "threshold" not in tensors and not spec.calibration:
        raise ConfigError("calibration: SAELens needs a threshold, and this rule's was not found yet")
    if top and spec.select_by_decoder_norm and (tensors["W_dec"].norm(dim=1) - 1).abs().max() > UNIT:
        raise ConfigError(
            "select_by_decoder_norm: SAELens' latents are then in units of the decoder's norms, here not 1; fold them"
        )
    if spec.encoding.pursues and spec.pre_bias == "none" and tensors["b_dec"].any():
        raise ConfigError("pre_bias: SAELens' matching pursuit adds b_dec only where it subtracts it, not with 'none'")
    config = {
        "architecture": f"{'jumprelu_' * (kind == 'jumprelu')}{'skip_' * spec.skip}transcoder" if transcodes else kind,
        "d_in": spec.d_in,
        "d_sae": spec.d_sae,
        **({"d_out": spec.d_out} if transcodes else {}),
        **({"k": constants["k"], "rescale_acts_by_decoder_norm": False} if top else {}),
        **(constants if kind == "matching_pursuit" else {}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": spec.pre_bias == "decoder",
        "normalize_activations": normalizes,
        "reshape_activations": "hook_z" if spec.reads and spec.reads[0].hook.endswith("hook_z") else "none",
    }
    return {**config, "metadata": metadata_of(spec, transcodes)}


def metadata_of(spec: CoderSpec, transcodes: bool) -> dict[str, Any]:
    """Returns what SAELens' config says of where a coder reads and writes; ConfigError of what it cannot name."""
    found: dict[str, Any] = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,  # it was not trained by SAELens
        "prepend_bos": spec.bos != "none",
        "context_size": spec.context_length,
        "seqpos_slice": [spec.mask.skip_positions, None],
        "exclude_special_tokens": list(spec.mask.special_ids),
    }
    named = {"hook_name": spec.reads, "hook_name_out": spec.writes if transcodes else ()}
    for name, site in ((name, site) for name, sites in named.items() for site in sites if site.hook):
        lens = bool(ALIAS.fullmatch(site.hook)) or site.hook == "hook_embed"
        if not lens and site.side != "output":
            raise ConfigError(f"{name}: SAELens can say a TransformerLens name or a module's output, not {site.name!r}")
        found |= {name: site.hook, "model_class_name": "HookedTransformer" if lens else "AutoModelForCausalLM"}
        found["model_name"] = site.model
    return found
