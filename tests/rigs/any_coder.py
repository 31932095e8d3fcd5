"""Random small coders of every kind that there is, and what they are given."""

import torch
from hypothesis import strategies as st

from sae.base import plugins
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.selection import Selection
from sae.selection.gradient_topk import GradientTopK
from sae.selection.groupmax import GroupMax
from sae.selection.mutual_choice import MutualChoice

D_SAE, TOKENS = 24, 20
RULES = {
    name: kind(k=3) if "k" in kind.__dataclass_fields__ else kind()
    for name, kind in plugins.names(Selection).items()
    if name == kind.get_choice_name(kind)
}
RULES |= {"groupmax": GroupMax(4), "groups of one": GroupMax(24), "one group": GroupMax(1)}
RULES |= {"calibrated": MutualChoice(3), "with gradients": GradientTopK(3, inference="gradient")}
WHOLE = ["matching_pursuit", "with gradients"]
ONE = (Site("a", scale=0.6),)
THREE_IN, THREE_OUT = (tuple(Site(f"{side}.{i}", width=w) for i in range(3)) for side, w in (("in", 4), ("out", 3)))
LAYERS = {"reads": THREE_IN, "writes": THREE_OUT, "cross_layer": True, "pre_bias": "own"}
NORMALIZATIONS = (
    Normalization(),
    Normalization("scalar", 0.8),
    Normalization("layer_norm"),
    Normalization("l2"),
    Normalization("center"),
)


def made(rule="relu", seed=0, whole=False, layers=False, **fields):
    """A random coder; `whole`, of whole numbers, so that ties abound and every product is exact."""
    selection, (d_in, d_out) = RULES[rule], (12, 9) if layers else (6, 6)
    fields = (LAYERS if layers else {"reads": ONE, "writes": ONE, "pre_bias": "decoder"}) | fields
    if selection.encoder:
        fields["encoder"] = "matching_pursuit"
    draw = torch.Generator().manual_seed(seed)
    coder = SparseCoder(CoderSpec(d_in, d_out, D_SAE, selection, decoder_norm="free", **fields)).requires_grad_(False)
    for name, tensor in coder.state_dict().items():
        random = torch.randn(tensor.shape, generator=draw)
        tensor.copy_(random.round() if whole else random)
        if name == "threshold":
            tensor.abs_()
    if selection.encoder:
        coder.W_enc.copy_(coder.W_dec)
        coder.b_enc.zero_()
    if rule in ("calibrated", "with gradients"):
        coder.spec = coder.spec.with_(calibration=tuple(1.0 + group.start / 10 for group in coder.rule_groups()))
    return coder


def batch(coder, whole=False, shape=(TOKENS,)):
    draw = torch.Generator().manual_seed(1)
    x, g = (torch.randn(*shape, width, generator=draw) for width in (coder.spec.d_in, coder.spec.d_out))
    return x.round() if whole else x, g if coder.spec.selection.looks_at_gradients else None


def entries(latents, asked=range(D_SAE)):
    """{(token, latent): value} of some latents, entries of value 0 included."""
    found = zip(latents.tokens.tolist(), latents.ids.tolist(), latents.values.tolist(), strict=True)
    return {(token, latent): value for token, latent, value in found if latent in set(asked)}


@st.composite
def kinds(draw):
    """Arguments of `made`: any kind of coder that there is."""
    rule, layers = draw(st.sampled_from(list(RULES))), draw(st.booleans())
    fields = {"select_by_decoder_norm": draw(st.booleans()) and rule != "jumprelu"}
    if RULES[rule].encoder or RULES[rule] == GroupMax(1) or RULES[rule] == GroupMax(24):
        layers = False
    if layers:
        fields["budget"] = draw(st.sampled_from(["block", "shared"]))
    else:
        fields["pre_bias"] = draw(st.sampled_from(["none", "decoder", "own"]))
        fields["normalization"] = draw(st.sampled_from(NORMALIZATIONS))
    fields |= {"skip": draw(st.booleans()), "encoder": draw(st.sampled_from(["linear", "glu"]))}
    return fields | {"rule": rule, "layers": layers, "seed": draw(st.integers(0, 2**20))}
