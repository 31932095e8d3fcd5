"""Gemma Scope 2: folders such as resid_post/layer_17_width_16k_l0_medium with `params.safetensors` and `config.json`.

    a = h 1[h > threshold],   h = x w_enc + b_enc,   out = a w_dec + b_dec [+ x affine_skip_connection]

w_enc is [d_in, d_sae]; there is no pre-bias and no normalization. The config says where it reads and writes in Hugging
Face terms; where it is missing, repository and path do. Transcoders read the norm before the MLP after its gain.

A cross-layer transcoder (clt/width_262k_l0_big) and a crosscoder (crosscoder/layer_7_13_17_22_width_65k_l0_medium) are
`params_layer_{i}.safetensors` for each of L layers, counted from 0: latents that read that layer alone, with w_dec
[M, L, d_out]. Both are causal: the rows for layers before a latent's own are 0, which is checked. Each is one coder.
"""

import re
from dataclasses import replace
from typing import Any

from torch import Tensor

from sae.base.errors import ConfigError, DataError
from sae.coder.spec import CoderSpec
from sae.formats._specs import released_spec
from sae.formats.cross_layer_transcoder import stack_layers
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection.jumprelu import JumpReLU
from sae.untrusted.configs import as_flag, one_of
from sae.untrusted.places import Place
from sae.untrusted.tensors import Tensors

WEIGHTS = r"params(_layer_0)?\.safetensors"
TENSORS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
SKIP = "affine_skip_connection"
REPOSITORY = re.compile(r"gemma-scope-2-(\d+[mb]-(?:pt|it))")
FOLDER = re.compile(
    r"(?P<kind>resid_post|mlp_out|attn_out|transcoder|crosscoder|clt)(?:_all)?/"
    r"(?:layer_(?P<layers>\d+(?:_\d+)*)_)?width_[^/_]+_l0_(?P<l0>small|medium|big)(?P<affine>_affine)?"
)
STREAM, HEADS = "output", "self_attn.o_proj.input"
BEFORE_MLP, AFTER_MLP = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
KINDS = {
    "resid_post": (STREAM, STREAM),
    "crosscoder": (STREAM, STREAM),
    "attn_out": (HEADS, HEADS),
    "mlp_out": (AFTER_MLP, AFTER_MLP),
    "transcoder": (BEFORE_MLP, AFTER_MLP),
    "clt": (BEFORE_MLP, AFTER_MLP),
}
HOOK = re.compile(r"model\.layers\.(\d+|\{all\}|\{\d+(?:,\d+)*\})\.(.+)")
NAMES = {STREAM: "hook_resid_post", HEADS: "attn.hook_z", AFTER_MLP: "hook_mlp_out"}
L0S = {"small": [10, 20], "medium": [30, 60], "big": [90, 150]}


def detect(place: Place) -> bool:
    """Returns whether the file holds a JumpReLU coder's five tensors in lower case."""
    return place.shapes().keys() >= TENSORS


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors), of a crosscoder or cross-layer transcoder those of the whole folder."""
    config = _described(place)
    one_of(config.get("architecture", "jump_relu"), ("jump_relu",), "architecture", place)
    several = "layer" in place.name
    layers, d_in, d_out = _layers(place, config) if several else _layer(place, config)
    n, m = len(layers), len(layers[0]["b_enc"])
    model = place.hints.model or _model(config)
    ends = (("hf_hook_point_in", d_in), ("hf_hook_point_out", d_out))
    reads, writes = (_sites(place, config, name, n, model, width if several else 0) for name, width in ends)
    if several and not reads:
        raise ConfigError(f"path: {place} does not say which layers it reads; put its config.json beside it")
    spec = released_spec(
        (n * d_in, n * d_out, n * m),
        JumpReLU(),
        (reads, writes),
        pre_bias="none",
        cross_layer=several,
        skip="W_skip" in layers[0],
        mask=MaskSpec(skip_positions=1),  # special tokens were left out
        context_length=1024,
        metrics={"advertised": config["advertised"]} if config["advertised"] else {},
    )
    return spec, stack_layers(layers) if several else layers[0]


def _described(place: Place) -> dict[str, Any]:
    """Returns the config, and what path and repository say of what it leaves out."""
    config = {name: value for name, value in place.config("config.json").items() if value is not None}
    repository, folder = REPOSITORY.search(place.identity), FOLDER.search(place.identity)
    said: dict[str, Any] = {"model_name": f"google/gemma-3-{repository[1]}"} if repository else {}
    if folder:
        layers = folder["layers"] or "{all}"
        layers = "{" + layers.replace("_", ",") + "}" if "_" in layers else layers
        points = zip(("hf_hook_point_in", "hf_hook_point_out"), KINDS[folder["kind"]], strict=True)
        said |= {name: f"model.layers.{layers}.{point}" for name, point in points}
        said |= {"affine_connection": bool(folder["affine"])}
    if isinstance(config.get("l0"), (int, float)):
        advertised = {"l0": float(config["l0"])}
    else:
        advertised = {"l0_range": L0S[folder["l0"]]} if folder else {}
    return {**said, **config, "advertised": advertised}


def _layer(place: Place, config: dict[str, Any]) -> tuple[list[dict[str, Tensor]], int, int]:
    found = place.tensors()
    d_sae, d_out = found["b_enc"].numel(), found["b_dec"].numel()
    d_in = found["w_enc"].numel() // max(1, d_sae)
    return [{**_encoder(found, config, d_in, d_sae, d_out), "W_dec": found.take("w_dec", d_sae, d_out)}], d_in, d_out


def _layers(place: Place, config: dict[str, Any]) -> tuple[list[dict[str, Tensor]], int, int]:
    """Returns each layer's tensors, with the rows of W_dec for that layer and all later ones."""
    shape = place.shapes()["w_dec"]
    if len(shape) != 3 or 0 in shape:
        raise DataError(f"{place}: tensor w_dec has shape {shape}, expected (M, layers, d_out)")
    m, n, d_out = shape
    there = place.beside(r"params_layer_\d+\.safetensors")
    if len(there) != n:
        raise DataError(f"{place}: w_dec writes to {n} layers, but there are {len(there)} files params_layer_*")
    layers, d_in = [], 0
    for i in range(n):
        found = replace(place, weights=place.sibling(f"params_layer_{i}.safetensors")).tensors()
        if i == 0:
            d_in, config = found["w_enc"].numel() // m, {"affine_connection": SKIP in found, **config}
        W_dec = found.take("w_dec", m, n, d_out)
        if not place.lazy and W_dec[:, :i].any():
            raise DataError(f"{found.source}: tensor w_dec writes to layers before its own; such coders are not read")
        layers.append({**_encoder(found, config, d_in, m, d_out), "W_dec": W_dec[:, i:]})
    return layers, d_in, d_out


def _encoder(found: Tensors, config: dict[str, Any], d_in: int, d_sae: int, d_out: int) -> dict[str, Tensor]:
    tensors = {
        "W_enc": found.take("w_enc", d_in, d_sae).T,
        "b_enc": found.take("b_enc", d_sae),
        "b_dec": found.take("b_dec", d_out),
        "threshold": found.take("threshold", d_sae),
    }
    if as_flag(config, "affine_connection", found.source, SKIP in found) != (SKIP in found):
        raise DataError(
            f"{found.source}: affine_connection is {config['affine_connection']}, but the tensor {SKIP} is "
            f"{'there' if SKIP in found else 'missing'}"
        )
    if SKIP in found:
        tensors["W_skip"] = found.take(SKIP, d_in, d_out).T
    return tensors


def _model(config: dict[str, Any]) -> str:
    """Returns the hub id: names may say gemma-v3 or leave the owner out, and the small model has no "-pt"."""
    name = str(config.get("model_name", "")).replace("-v3", "-3")
    name = name if "/" in name or not name else f"google/{name}"
    return name.removesuffix("-pt") if "270m" in name else name


def _sites(place: Place, config: dict[str, Any], name: str, n: int, model: str, width: int) -> tuple[Site, ...]:
    """Returns the sites of a hook point, by names that are good for the language model inside a larger one too."""
    if not {"hf_hook_point_in", "hf_hook_point_out"} & config.keys():
        return ()
    point = HOOK.fullmatch(str(config.get(name)))
    path, _, side = point[2].rpartition(".") if point else ("", "", "")
    if not point or side not in ("input", "output"):
        raise DataError(f"{place}: {name} is {config.get(name)!r}, expected model.layers.N.PLACE.input or .output")
    numbers = list(range(n)) if point[1] == "{all}" else [int(part) for part in point[1].strip("{}").split(",")]
    if len(numbers) != n:
        raise DataError(f"{place}: {name} is {config[name]!r}, which are {len(numbers)} layers; the weights are of {n}")
    if point[2] in NAMES:
        return tuple(Site(f"blocks.{i}.{NAMES[point[2]]}", model=model, width=width) for i in numbers)
    return tuple(Site(f"layers.{i}{'.' + path if path else ''}", side, model, width=width) for i in numbers)
