"""Multiplying the inputs, outputs and latents of a coder, so that the map stays: what the folds of scales share.

    inputs times s, outputs over t, latents times f      W_enc s f, b_enc f, b_pre / s, W_dec / (f t), b_dec / t

What selection compares is then multiplied by g = f, or by f |new W_dec| / |W_dec| where it compares with decoder norms.
Thresholds follow g. Rules that compare latents with each other need one g for all.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.spec import CoderSpec
from sae.kernels.scaling import alike, ratio, times
from sae.selection import Factors

Coder = tuple[CoderSpec, dict[str, Tensor]]


def rescaled(
    spec: CoderSpec,
    tensors: dict[str, Tensor],
    into: Float[Tensor, "d_in"],
    out: Float[Tensor, "d_out"],
    latents: Float[Tensor, "d_sae"],
) -> Coder:
    """Returns a coder of inputs times `into` and outputs over `out` as one of neither, with latents times `latents`.

    Its normalization is left for the caller to say. A factor of 0 is for a latent whose decoder is 0.
    """
    if spec.pre_bias == "decoder" and not torch.equal(into, out):  # b_dec cannot be both any more
        spec, tensors = spec.with_(pre_bias="own"), {**tensors, "b_pre": tensors["b_dec"]}
    layers = spec.n_blocks
    columns = _narrow(into.view(layers, -1)).repeat_interleave(spec.d_sae // layers if layers > 1 else 1, dim=0)
    latent, layer = rows_of_decoder(spec, into.device)
    factors = {
        **dict.fromkeys(spec.encoding.maps, columns),
        "b_pre": 1 / into,
        "W_dec": torch.where(latents > 0, 1 / latents, 1.0)[latent, None] / _narrow(out.view(layers, -1))[layer],
        "b_dec": 1 / out,
    }
    for name, factor in encoder_factors(spec, latents).items():
        factors[name] = factors[name] * factor if name in factors else factor
    folded = {name: times(t, factors[name]) if name in factors else t for name, t in tensors.items()}
    factor = latents
    if spec.select_by_decoder_norm:
        one = (1 / out[:1]).expand(spec.d_sae)
        factor = one if alike(out) else latents * ratio(norms(spec, folded), norms(spec, tensors))
    return recompared(_described(spec, into, out, latents), folded, latents, factor)


def recompared(spec: CoderSpec, tensors: dict[str, Tensor], latents: Tensor, compared: Tensor) -> Coder:
    """Returns a coder whose latents, and scores as they are compared, were multiplied, with the rule that fits them.

    ConfigError if there is none.
    """
    if alike(compared, 1.0):  # and so stay to the last bit
        compared = torch.ones_like(compared)
    parts = compared.chunk(1 if spec.budget == "shared" else spec.n_blocks)
    own = {name: t for name, t in tensors.items() if name in rule_tensors(spec)}
    factors = Factors(latents, parts, spec.select_by_decoder_norm)
    rule, changed, calibration = spec.selection.rescaled(own, spec.calibration, factors)
    return spec.with_(selection=rule, calibration=calibration), {**tensors, **changed}


def encoder_factors(spec: CoderSpec, latents: Float[Tensor, "d_sae"]) -> dict[str, Tensor]:
    """Returns what the encoder's tensors are multiplied by where its latents are; ConfigError if nothing is known."""
    if spec.encoding.scaled is None and not alike(latents, 1.0):
        raise ConfigError(f"encoder: {spec.encoder!r} is not one of which it is known how latents are multiplied")
    scaled = spec.encoding.scaled or ()
    return {name: latents[:, None] if name in spec.encoding.maps else latents for name in scaled}


def rule_tensors(spec: CoderSpec) -> set[str]:
    """Returns the names of the tensors that are the rule's own."""
    return {*spec.selection.parameters(0), *spec.selection.buffers(0)}


def _described(
    spec: CoderSpec, into: Float[Tensor, "d_in"], out: Float[Tensor, "d_out"], latents: Float[Tensor, "d_sae"]
) -> CoderSpec:
    """Returns the spec with what it says of a coder that is rescaled, beside its thresholds."""
    one = float(latents[0]) if alike(latents) else 0.0  # 0: of each its own
    decoder_stays = alike(one * out, 1.0)
    changes: dict[str, Any] = {"decoder_norm": spec.decoder_norm if decoder_stays else "free"}
    if spec.variance is not None:
        changes["variance"] = spec.variance / float(out[0]) ** 2 if alike(out) else None
    if spec.encoding.pursues and not (decoder_stays and alike(one * into, 1.0)):
        raise ConfigError(
            f"selection: {spec.encoder!r} encodes by its decoder, whose rows must stay; of these folds it allows "
            "that of one scale, with units='raw'"
        )
    return spec.with_(**changes)


def norms(spec: CoderSpec, tensors: dict[str, Tensor]) -> Float[Tensor, "d_sae"]:
    """Returns the norm of each latent's decoder over all that it writes, in float64."""
    own = torch.linalg.vector_norm(tensors["W_dec"], dim=1, dtype=torch.float64)
    latent, _ = rows_of_decoder(spec, own.device)
    return own.new_zeros(spec.d_sae).index_add_(0, latent, own.square()).sqrt()


def rows_of_decoder(spec: CoderSpec, device: torch.device) -> tuple[Int[Tensor, "rows"], Int[Tensor, "rows"]]:
    """Returns the latent of every row of W_dec, and the layer that the row writes to."""
    ids = torch.arange(spec.d_sae, device=device)
    first = ids // (spec.d_sae // spec.n_blocks)  # the layer that a latent reads is the first that it writes
    counts = spec.n_blocks - first
    latent = ids.repeat_interleave(counts)
    place = torch.arange(len(latent), device=device) - (counts.cumsum(0) - counts)[latent]
    return latent, first[latent] + place


def _narrow(factors: Float[Tensor, "layers width"]) -> Float[Tensor, "layers some"]:
    """Returns one column where all are equal: a product with it takes no memory."""
    return factors[:, :1] if bool((factors == factors[:, :1]).all()) else factors
