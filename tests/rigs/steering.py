"""Coders of every kind for the tiny models, with random weights, and what they make of a model written down by hand."""

import torch

from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection.gated import Gated
from sae.selection.groupmax import GroupMax
from sae.selection.jumprelu import JumpReLU
from sae.selection.matching_pursuit import MatchingPursuit
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK

D, D_SAE = 16, 48
LAYERS = range(3)
RESIDUAL = (Site("model.layers.1", width=D),)
INS = tuple(Site(f"model.layers.{n}.mlp", "input", width=D) for n in LAYERS)
OUTS = tuple(Site(f"model.layers.{n}.mlp", width=D) for n in LAYERS)
Z = (Site("model.layers.1.self_attn.o_proj", "input", width=D, heads=2),)
SEVERAL = (Site("model.layers.0", width=D), Site("model.layers.2", width=D))
FREE = {"pre_bias": "own", "decoder_norm": "free"}
CROSS = {"reads": INS, "writes": OUTS, "cross_layer": True, **FREE}

KINDS = {
    "topk": (TopK(4), {}),
    "relu": (ReLU(), {}),
    "jumprelu": (JumpReLU(), {}),
    "gated": (Gated(), {}),
    "groupmax": (GroupMax(4), {}),
    "signed": (SignedTopK(4), {}),
    "batch-wide": (MutualChoice(4), {"calibration": (0.7,)}),
    "matching pursuit": (MatchingPursuit(), {"encoder": "matching_pursuit"}),
    "glu": (TopK(4), {"encoder": "glu"}),
    "scalar": (TopK(4), {"normalization": Normalization("scalar", 0.3)}),
    "layer_norm": (TopK(4), {"normalization": Normalization("layer_norm")}),
    "l2": (TopK(4), {"normalization": Normalization("l2")}),
    "center": (ReLU(), {"normalization": Normalization("center")}),
    "attention": (TopK(4), {"reads": Z, "writes": Z}),
    "transcoder": (TopK(4), {"reads": INS[1:2], "writes": OUTS[1:2], **FREE}),
    "skip": (ReLU(), {"reads": INS[1:2], "writes": OUTS[1:2], "skip": True, **FREE}),
    "to a later layer": (TopK(4), {"reads": RESIDUAL, "writes": SEVERAL[1:], **FREE}),
    "from a later layer": (TopK(4), {"reads": SEVERAL[1:], "writes": RESIDUAL, **FREE}),
    "crosscoder": (TopK(4), {"reads": SEVERAL, "writes": SEVERAL}),
    "crosscoder, l2": (TopK(4), {"reads": SEVERAL, "writes": SEVERAL, "normalization": Normalization("l2")}),
    "cross-layer": (TopK(4), CROSS),
    "cross-layer, shared": (TopK(4), {**CROSS, "budget": "shared"}),
    "cross-layer, thresholds": (ReLU(), CROSS),
}


def coder_of(kind: str, mask: MaskSpec | None = None) -> SparseCoder:
    """Returns a random coder whose latents fire; it masks the first of a row and the special tokens by default."""
    rule, options = KINDS[kind]
    said = {"reads": RESIDUAL, "writes": RESIDUAL, "mask": mask or MaskSpec((0, 1, 2), 1), **options}
    d_in, d_out = (sum(site.width for site in said[side]) for side in ("reads", "writes"))
    coder = SparseCoder(CoderSpec(d_in, d_out, D_SAE, rule, **said)).requires_grad_(False)
    draw = torch.Generator().manual_seed(5)
    for name, parameter in coder.named_parameters():
        size = {"b_mag": 0.1, "threshold": 0.0}.get(name, 0.3)
        parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    return coder


def by_hand(coder: SparseCoder, seen: dict[str, torch.Tensor], latent: int, new) -> torch.Tensor:
    """Returns what clamping and the like add to the output [n, d_out], of full codes of what was seen at the sites."""
    x = torch.cat([seen[site.name][0].float() for site in coder.spec.reads], dim=-1)
    codes = coder.encode_dense(x)
    edited = codes.clone()
    edited[:, latent] = new(codes[:, latent])
    return coder.decode(edited, x) - coder.decode(codes, x)
