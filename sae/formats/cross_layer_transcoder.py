"""circuit-tracer's cross-layer transcoders: a folder with `W_enc_{i}` and `W_dec_{i}` for each of L layers.

    a_i = act(x_i W_enc_i^T + b_enc_i),   out_j = b_dec_j + sum over i <= j of a_i W_dec_i[:, j - i] [+ x_j W_skip_j]

`W_enc_{i}.safetensors` holds W_enc_i [M, d_in], b_enc_i, b_dec_i (of the layer written), threshold_i where the rule is
JumpReLU (else ReLU) and W_skip_i [d_in, d_out] where it has a skip; `W_dec_{i}.safetensors` W_dec_i [M, L - i, d_out].
`config.yaml` says model and hooks, as for per-layer transcoders. The whole folder is one coder; it goes by its W_enc_0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae.base.errors import DataError
from sae.coder.spec import CoderSpec
from sae.formats._specs import released_spec
from sae.formats.circuit_tracer import checked_thresholds, layer_sites, read_set_config
from sae.selection.jumprelu import JumpReLU
from sae.selection.relu import ReLU
from sae.untrusted.configs import one_of
from sae.untrusted.places import Place

WEIGHTS = r"W_enc_0\.safetensors"
KIND = "cross_layer_transcoder"


def detect(place: Place) -> bool:
    """Returns whether the file holds the encoder of a first layer."""
    return place.shapes().keys() >= {"W_enc_0", "b_enc_0", "b_dec_0"}


def read(place: Place) -> tuple[CoderSpec, dict[str, Tensor]]:
    """Returns (spec, tensors) of the whole folder; DataError if a layer is missing or there is one too many."""
    config = read_set_config(place, KIND)
    m, n_layers, d_out = _decoder(place)
    d_in, jumps, skips = 0, False, False
    layers = []
    for i in range(n_layers):
        found = place.tensors(f"W_enc_{i}.safetensors", f"W_dec_{i}.safetensors")
        if i == 0:
            d_in = found["W_enc_0"].numel() // m
            jumps, skips = "threshold_0" in found, "W_skip_0" in found
        layer = {
            "W_enc": found.take(f"W_enc_{i}", m, d_in),
            "b_enc": found.take(f"b_enc_{i}", m),
            "W_dec": found.take(f"W_dec_{i}", m, n_layers - i, d_out),
            "b_dec": found.take(f"b_dec_{i}", d_out),
        }
        if jumps:
            layer["threshold"] = checked_thresholds(found, f"threshold_{i}", m)
        if skips:
            layer["W_skip"] = found.take(f"W_skip_{i}", d_in, d_out).T
        layers.append(layer)
    rule = "jump_relu" if jumps else "relu"
    one_of(config.get("activation", rule), (rule,), "activation", place)
    reads, writes = layer_sites(place, config, range(n_layers), (d_in, d_out))
    spec = released_spec(
        (n_layers * d_in, n_layers * d_out, n_layers * m),
        JumpReLU() if jumps else ReLU(),
        (reads, writes),
        pre_bias="none",
        cross_layer=True,
        skip=skips,
    )
    return spec, stack_layers(layers)


def stack_layers(layers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns a cross-layer coder's tensors from those of each layer, whose W_dec is [M, layers at or after it, d_out].

    The decoders, which are most of it, are copied once.
    """
    n, (m, _, d_out) = len(layers), layers[0]["W_dec"].shape
    W_dec = torch.empty(m * n * (n + 1) // 2, d_out, dtype=layers[0]["W_dec"].dtype)
    parts = W_dec.split([m * (n - i) for i in range(n)])
    for part, layer in zip(parts, layers, strict=True):
        part.view(m, -1, d_out).copy_(layer["W_dec"])
    others = {name: torch.cat([layer[name] for layer in layers]) for name in layers[0] if name != "W_dec"}
    return {**others, "W_dec": W_dec}


def _decoder(place: Place) -> tuple[int, int, int]:
    """Returns (M, L, d_out) of the first decoder; DataError if the folder's files are not those of L layers."""
    shape = place.shapes("W_dec_0.safetensors").get("W_dec_0", ())
    if len(shape) != 3 or 0 in shape:
        raise DataError(f"{place}: tensor W_dec_0 has shape {shape}, expected (M, layers, d_out)")
    expected = {f"W_{kind}_{i}.safetensors" for kind in ("enc", "dec") for i in range(shape[1])}
    there = set(place.beside(r"W_(enc|dec)_\d+\.safetensors"))
    for name in sorted(expected ^ there):
        what = "missing" if name in expected else "one too many"
        raise DataError(f"{place}: {name} is {what}; W_dec_0 writes to {shape[1]} layers")
    return shape
