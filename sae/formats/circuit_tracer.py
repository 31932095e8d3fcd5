"""circuit-tracer's per-layer transcoders: `layer_{i}.safetensors` for every layer, and one `config.yaml` beside them.

    a = act(x W_enc^T + b_enc),   out = a W_dec + b_dec [+ x W_skip^T]

W_enc is [d_sae, d], W_dec [d_sae, d], or [d, d_sae] in the files of June 2025; W_skip is [d_out, d_in]. The config says
model, hooks below "blocks.{i}." and `activation`: "relu", or "topk" with `k`. Without it a threshold makes it JumpReLU,
h 1[h > threshold], and none makes it ReLU. Its TopK keeps the k largest as they are, negative ones too. Version 0.5.0
reads neither `activation` nor `k` yet, and takes such a coder for ReLU.

Its cross-layer folders are another format, `cross_layer_transcoder`, which shares what is below. A config's list
`transcoders` points to files elsewhere: it is reported in `spec.training` and never followed.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.base.errors import ConfigError, DataError
from sae.base.files import atomic_write, save_tensors
from sae.base.settings import read_yaml, to_yaml
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.formats._exporting import check_expressible, rule_of
from sae.formats._specs import released_spec, unsaid_sites
from sae.lm.site import Site
from sae.lm.sites import ALIAS, ALIASES, model_id, parse_site
from sae.selection import Selection
from sae.selection.jumprelu import JumpReLU
from sae.selection.relu import ReLU
from sae.selection.unrectified_topk import UnrectifiedTopK
from sae.untrusted.configs import as_int, one_of
from sae.untrusted.places import Place
from sae.untrusted.tensors import Tensors, check_finite

log = logging.getLogger(__name__)
WEIGHTS = r"layer_\d+\.safetensors"
CONFIG, KIND, THRESHOLD = "config.yaml", "transcoder_set", "activation_function.threshold"
ACTIVATIONS = {"relu": "relu", "jumprelu": "", "unrectified_topk": "topk"}  # our rules in their words
TENSORS = {"W_enc", "W_dec", "b_enc", "b_dec"}
PLACES = {  # names of the modules below a layer that are one place in every model that has them
    ("", "input"): "hook_resid_pre",
    ("", "output"): "hook_resid_post",
    ("input_layernorm", "normalized"): "ln1.hook_normalized",
    ("self_attn.o_proj", "input"): "attn.hook_z",
    ("post_self_attn_layernorm", "output"): "hook_attn_out",
    ("pre_feedforward_layernorm", "input"): "hook_resid_mid",
    ("pre_feedforward_layernorm", "normalized"): "ln2.hook_normalized",
    ("pre_feedforward_layernorm", "output"): "mlp.hook_in",
    ("mlp", "input"): "mlp.hook_in",
    ("mlp.down_proj", "input"): "mlp.hook_post",
    ("mlp", "output"): "mlp.hook_out",
    ("post_feedforward_layernorm", "output"): "hook_mlp_out",
}
CRV = "facebook/crv-8b-instruct-transcoders"  # TopK of 128, which at first only circuit-tracer itself knew
QWEN = re.compile(r"mwhanna/qwen3-(\d+(?:\.\d+)?)b-transcoders")  # ReLU; those of the 14B have no config.yaml
Sites = tuple[tuple[Site, ...], tuple[Site, ...]]


def detect(place: Place) -> bool:
    """Returns whether the file holds the four tensors of a transcoder."""
    return place.shapes().keys() >= TENSORS


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors)."""
    config = read_set_config(place, KIND)
    found = place.tensors()
    d_sae, d_out = found["b_enc"].numel(), found["b_dec"].numel()
    d_in = found["W_enc"].numel() // max(1, d_sae)
    tensors = {
        "W_enc": found.take("W_enc", d_sae, d_in),
        "W_dec": found.matrix("W_dec", d_sae, d_out),
        "b_enc": found.take("b_enc", d_sae),
        "b_dec": found.take("b_dec", d_out),
    }
    if "W_skip" in found:
        tensors["W_skip"] = found.take("W_skip", d_out, d_in)
    selection = _selection(place, config, found)
    if selection.trains_thresholds:
        tensors["threshold"] = checked_thresholds(found, THRESHOLD, d_sae)
    reads, writes = layer_sites(place, config, [int(re.sub(r"\D", "", place.name))])
    training = {"transcoders": list(map(str, config["transcoders"]))} if config.get("transcoders") else {}
    spec = released_spec(
        (d_in, d_out, d_sae), selection, (reads, writes), pre_bias="none", skip="W_skip" in tensors, training=training
    )
    return spec, tensors


def read_set_config(place: Place, kind: str) -> dict[str, Any]:
    """Returns the config of a folder whose `model_kind`, if it says one, is `kind`; DataError otherwise.

    Of the one released set that has none it is what SAELens' table of releases knows.
    """
    config = place.config(CONFIG)
    one_of(config.get("model_kind", kind), (kind,), "model_kind", place)
    qwen = QWEN.search(place.identity)
    if not config and qwen:
        config = {"model_name": f"Qwen/Qwen3-{qwen[1]}B", "activation": "relu"}
        config |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    return config


def layer_sites(place: Place, config: dict[str, Any], layers: Iterable[int], widths: tuple[int, int] = (0, 0)) -> Sites:
    """Returns (reads, writes), one site a layer, as far as the config or the user says it."""
    asks = "feature_input_hook" not in config and "feature_output_hook" not in config
    how = "'blocks.*.READ->blocks.*.WRITTEN'"
    said = place.site_hint("its config is not there", how) if asks else place.hint("site")
    model = place.hints.model or model_id(str(config.get("model_name") or ""))
    if asks and said is None:
        unsaid = [[unsaid_sites(model, width)[side] for _ in layers] for side, width in enumerate(widths)]
        return tuple(unsaid[0]), tuple(unsaid[1])
    if said is not None:
        hooks = tuple(said.split("->"))
        if len(hooks) != 2:
            example = "blocks.*.hook_resid_mid->blocks.*.hook_mlp_out"
            raise ConfigError(f"site: {said!r} is not READ->WRITTEN, where * is the layer, such as {example!r}")
    else:
        names = ("feature_input_hook", "feature_output_hook")
        hooks = tuple(f"blocks.*.{one_of(config.get(name), ALIASES, name, place)}" for name in names)
    reads, writes = (
        tuple(parse_site(hook.replace("*", str(layer)), model, width) for layer in layers)
        for hook, width in zip(hooks, widths, strict=True)
    )
    return reads, writes


def checked_thresholds(found: Tensors, name: str, d_sae: int) -> Tensor:
    """Returns the thresholds of h 1[h > threshold]; DataError if one is negative, for then codes would be too."""
    threshold = found.take(name, d_sae)
    if (threshold < 0).any():
        raise DataError(
            f"{found.source}: tensor {name} has negative thresholds, at which latents of this format fire "
            "with negative values; such coders are not read"
        )
    return threshold


def _selection(place: Place, config: Mapping[str, Any], found: Tensors) -> Selection:
    crv = CRV in place.identity
    activation = config.get("activation", "topk" if crv else None)
    if activation is None and config.get("k") is not None:
        raise DataError(f"{place}: {CONFIG} has k = {config['k']!r} but no activation, which would say that it is TopK")
    if activation is None:
        return JumpReLU() if THRESHOLD in found else ReLU()
    if one_of(activation, ("relu", "topk"), "activation", place) == "relu":
        return ReLU()
    said = [as_int(config["k"], "k", place)] if config.get("k") is not None else []
    said += [as_int(found.number("k"), "k", place)] if "k" in found else []
    said = said or ([128] if crv else [])
    if len(set(said)) != 1:
        what = f"given as {said[0]} and as {said[1]}" if said else f"missing; activation 'topk' needs it in {CONFIG}"
        raise DataError(f"{place}: k is {what}")
    return UnrectifiedTopK(said[0])


def write(folder: Path, coder: SparseCoder) -> None:
    """Writes a transcoder as the one of its layer in a set; ConfigError names what the format cannot say.

    The folder may hold other layers' already, if their config is the same. Thresholds are written as they act, from 0.
    Scale and pre-bias are not folded here: `SparseCoder.fold_scale` and `fold_pre_bias` do that.
    """
    spec = coder.spec
    check_expressible("circuit-tracer", spec, selection=ACTIVATIONS, skip=(True,))
    if spec.d_in != spec.d_out:
        raise ConfigError(
            f"d_out: circuit-tracer cannot say {spec.d_out} beside d_in = {spec.d_in}; they must be equal"
        )
    if not spec.is_placed:
        raise ConfigError("reads: circuit-tracer needs to know where the coder reads and writes, which it does not say")
    (layer, read_hook), (other, written_hook) = _named(spec.reads[0]), _named(spec.writes[0])
    if layer != other:
        raise ConfigError(f"writes: circuit-tracer cannot say layer {other} of a transcoder that reads layer {layer}")
    config = {"model_name": spec.writes[0].model} if spec.writes[0].model else {}
    config |= {"model_kind": KIND, "feature_input_hook": read_hook, "feature_output_hook": written_hook}
    rule, constants = rule_of(spec)
    if ACTIVATIONS[rule]:
        config |= {"activation": ACTIVATIONS[rule]}
    if "k" in constants:
        log.warning("%s: circuit-tracer 0.5.0 takes TopK for ReLU; a newer one is needed", folder)
        config |= {"k": constants["k"]}
    tensors = {name: tensor.detach().cpu() for name, tensor in coder.state_dict().items()}
    if "threshold" in tensors:
        tensors[THRESHOLD] = tensors.pop("threshold").clamp_min(0)
    check_finite(tensors, f"the coder for {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG
    if path.exists() and read_yaml(path) != config:
        raise ConfigError(f"folder: {path} describes another set of transcoders; choose an empty folder")
    save_tensors(folder / f"layer_{layer}.safetensors", tensors)
    atomic_write(path, to_yaml(config))


def _named(site: Site) -> tuple[int, str]:
    """Returns (layer, TransformerLens' name below it) of a site, if a name means that place in every model."""
    alias = ALIAS.fullmatch(site.hook)
    if alias and alias[1] != "*" and alias[2] in ALIASES:
        return int(alias[1]), alias[2]
    parts = site.hook.split(".")
    layer = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    if layer is not None:
        place = (".".join(parts[layer + 1 :]), site.side)
        if place in PLACES:
            return int(parts[layer]), PLACES[place]
    raise ConfigError(
        f"site: circuit-tracer has no name for {site.name!r} that fits every model; name the coder's site "
        f"blocks.N and one of {', '.join(ALIASES)}"
    )
