"""How the tensors of a coder start before training."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.seeding import generator
from sae.coder.tensors import CoderTensors
from sae.encoders import affine


def initialize(
    coder: CoderTensors,
    center: Float[Tensor, "d_out"],
    seed: int,
    *key: str | int,
    input_center: Float[Tensor, "d_in"] | None = None,
    spread: float = 1.0,
) -> None:
    """Starts a coder as TopK scaling does (Gao 2024, arXiv 2406.04093, appendix A).

    Rows of W_enc are random unit vectors, b_enc is zero and b_dec is `center`, the mean or geometric median of the
    normalized training activations. An autoencoder's W_dec is a copy of W_enc (the tied start keeps latents alive). A
    transcoder's W_dec is zero, so that it starts by predicting the mean output; its encoder is centered on
    `input_center`, by b_pre or, without one, by b_enc (Paulo 2025, arXiv 2501.18823). `spread`, the standard deviation
    of an input's component, is that of the pre-activations, from which trained thresholds start.
    """
    spec = coder.spec
    rows = torch.randn(coder.W_enc.shape, generator=generator(seed, "init", *key))
    rows = rows / rows.norm(dim=1, keepdim=True)
    with torch.no_grad():
        coder.W_enc.copy_(rows)
        coder.b_dec.copy_(center)
        if spec.is_autoencoder and not spec.cross_layer:
            coder.W_dec.copy_(rows)
        elif input_center is not None and spec.pre_bias == "own":
            coder.b_pre.copy_(input_center)
        elif input_center is not None and spec.pre_bias == "none":
            for weight, bias in ((getattr(coder, w), getattr(coder, b)) for w, b in spec.encoding.maps.items()):
                bias.copy_(-(affine(input_center[None].to(weight), weight, bias, spec.n_blocks) - bias)[0])
        for name, start in spec.selection.parameters(spec.d_sae, spread).items():
            getattr(coder, name).copy_(start)
