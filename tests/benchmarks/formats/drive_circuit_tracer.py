"""circuit-tracer: per-layer transcoders of each rule, cross-layer transcoders, and transcoders of ours."""

import torch
import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet, load_relu_transcoder
from common import D_IN, D_SAE, TOKENS, K, draw, randomize, run, store

LAYERS = 3
HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out", "model_name": "some/model"}


def make(folder):
    """Saves one transcoder of each kind with what it makes of activations.

    Its TopK is saved by no function of 0.5.0, so that `k` is put into the config as later sets have it.
    """
    x = 1.5 * draw(TOKENS, D_IN, seed=7)
    rules = {"relu": lambda: torch.relu, "jumprelu": lambda: JumpReLU(torch.zeros(D_SAE), 0.1)}
    rules |= {"topk": lambda: TopK(K), "topk, most latents": lambda: TopK(D_SAE * 2 // 3)}  # some of them negative
    for rule, activation in rules.items():
        for skip in (False, True):
            options = {"skip_connection": skip, "dtype": torch.float32, "device": torch.device("cpu")}
            coder = randomize(SingleLayerTranscoder(D_IN, D_SAE, activation(), 0, **options))
            place = folder / f"{rule}{' with skip' if skip else ''}"
            whole = TranscoderSet({0: coder}, HOOKS["feature_input_hook"], HOOKS["feature_output_hook"])
            whole.to_safetensors(str(place / "coder"))
            config = {"model_kind": "transcoder_set", **HOOKS}
            config |= {"activation": "topk", "k": coder.activation_function.k} if "topk" in rule else {}
            (place / "coder" / "config.yaml").write_text(yaml.safe_dump(config))
            store(place, x, coder.encode(x), coder(x))
    for rule in ("relu", "jump_relu"):
        across(folder / f"cross-layer {rule}", rule)


def across(folder, rule):
    """A cross-layer transcoder, whose layers we have side by side."""
    x = 1.5 * draw(LAYERS, TOKENS, D_IN, seed=7)
    options = {"lazy_decoder": False, "dtype": torch.float32, "device": torch.device("cpu")}
    coder = randomize(CrossLayerTranscoder(LAYERS, D_SAE, D_IN, rule, **options))
    coder.to_safetensors(str(folder / "coder"))
    config = {"model_kind": "cross_layer_transcoder", **HOOKS}
    (folder / "coder" / "config.yaml").write_text(yaml.safe_dump(config))
    x, acts, out = (found.transpose(0, 1).flatten(1) for found in (x, coder.encode(x), coder(x)))
    store(folder, x, acts, out)


def load(folder, x):
    """What circuit-tracer makes of a coder of ours; 0.5.0 does not read `activation`, which is set here."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (path,) = folder.glob("layer_*.safetensors")
    lazy = {"lazy_encoder": False, "lazy_decoder": False}
    coder = load_relu_transcoder(str(path), 0, torch.device("cpu"), torch.float32, **lazy)
    if config.get("activation") == "topk":
        coder.activation_function = TopK(config["k"])
    return coder.encode(x), coder(x)


if __name__ == "__main__":
    run(make, load)
