"""What the names of modules suggest, for a model without weights, of which nothing can be measured.

An estimate needs widths and the order of places; the run itself measures where they are (`residual.py`).
"""

from torch import nn

from sae.lm.layer import NAMES, Place
from sae.lm.probing import reader_of

LAYER_LISTS = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "language_model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "encoder.layer",
    "layers",
    "h",
)
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense", "output.dense")
MLPS = ("mlp", "feed_forward")
MLP_OUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out")
BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
USUAL: dict[str, tuple[tuple[str, ...], str]] = {
    "hook_attn_out": (("post_self_attn_layernorm", *ATTENTION), "output"),
    "hook_resid_mid": (BEFORE_MLP, "input"),
    "hook_mlp_in": (BEFORE_MLP, "input"),
    "hook_mlp_out": (("post_feedforward_layernorm", "post_mlp_layernorm", *MLPS), "output"),
    "ln1.hook_normalized": (("input_layernorm", "ln_1"), "normalized"),
    "ln2.hook_normalized": (BEFORE_MLP, "normalized"),
    "attn.hook_z": (tuple(f"{owner}.{out}" for owner in ATTENTION for out in ATTENTION_OUT), "input"),
    "mlp.hook_in": (MLPS, "input"),
    "mlp.hook_post": (tuple(f"{owner}.{out}" for owner in MLPS for out in MLP_OUT), "input"),
    "mlp.hook_out": (MLPS, "output"),
}
LATE = ("hook_resid_post", "hook_mlp_out", "mlp.hook_post", "mlp.hook_out")


def guessed_layers(model: nn.Module) -> tuple[str, ...]:
    """Returns the paths of a model's layers: of a list of a usual name, else of the largest of its lists."""
    read = set(reader_of(model).modules())
    lists = {p: m for p, m in model.named_modules() if m in read and isinstance(m, nn.ModuleList) and len(m)}
    usual = [path for path in LAYER_LISTS if path in lists]
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in lists.items()}
    path = next(iter(usual), max(sizes, key=lambda path: sizes[path], default=""))
    return tuple(f"{path}.{n}" for n in range(len(lists[path]))) if path else ()


def guessed_places(model: nn.Module, layers: tuple[str, ...]) -> dict[tuple[int, str], Place | str]:
    """Returns a place for every name in every layer: as usually called, else the layer's own input or output."""
    modules = {path for path, _ in model.named_modules()}
    found: dict[tuple[int, str], Place | str] = {}
    for number, layer in enumerate(layers):
        for name in NAMES:
            paths, side = USUAL.get(name, ((), ""))
            place = next((f"{layer}.{path}" for path in paths if f"{layer}.{path}" in modules), None)
            found[number, name] = (place, side) if place else (layer, "output" if name in LATE else "input")
    return found
