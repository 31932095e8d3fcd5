"""Multiplying the inputs, outputs and latents of a coder, so that the map stays: what the folds of scales share.

    inputs times s, outputs over t, latents times f      W_enc s f, b_enc f, b_pre / s, W_dec / (f t), b_dec / t

What selection compares is then multiplied by g = f, or by f |new W_dec| / |W_dec| where it compares with decoder norms.
Thresholds follow g. Rules that compare latents with each other need one g for all.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.partial import ALONE, BEST
from sae.coder.spec import CoderSpec
from sae.selection import Selection
from sae.selection.feature_choice import NEVER
from sae.selection.gradient_topk import GradientTopK
from sae.selection.groupmax import GroupMax
from sae.selection.jumprelu import JumpReLU
from sae.selection.matching_pursuit import MatchingPursuit
from sae.selection.mutual_choice import MutualChoice

Coder = tuple[CoderSpec, dict[str, Tensor]]
ALIKE = 1e-6  # factors nearer than this are one: what float32 leaves of rows that were divided by their norms


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
        "W_enc": columns * latents[:, None],
        "W_glu": columns,
        "b_enc": latents,
        "b_mag": latents,
        "b_pre": 1 / into,
        "W_dec": torch.where(latents > 0, 1 / latents, 1.0)[latent, None] / _narrow(out.view(layers, -1))[layer],
        "b_dec": 1 / out,
    }
    folded = {name: times(t, factors[name]) if name in factors else t for name, t in tensors.items()}
    factor = latents
    if spec.select_by_decoder_norm:
        one = (1 / out[:1]).expand(spec.d_sae)
        factor = one if alike(out) else latents * ratio(norms(spec, folded), norms(spec, tensors))
    return recompared(_described(spec, into, out, latents), folded, factor)


def recompared(spec: CoderSpec, tensors: dict[str, Tensor], factor: Float[Tensor, "d_sae"]) -> Coder:
    """Returns a coder whose scores, as selection compares them, have been multiplied by `factor`, with its thresholds.

    ConfigError if latents are compared with each other and the factors differ.
    """
    rule, name = spec.selection, Selection.get_choice_name(type(spec.selection))
    if rule.pursues or alike(factor, 1.0):
        return spec, tensors
    if type(rule) not in (*ALONE, *BEST, GroupMax):
        raise ConfigError(f"selection: {name!r} is not a rule of which it is known what a factor does to it")
    if "threshold" in tensors:
        tensors = {**tensors, "threshold": times(tensors["threshold"], factor).clamp_max(NEVER)}
    groups = factor.chunk(1 if spec.budget == "shared" else spec.n_blocks)
    if all(map(alike, groups)):
        if type(rule) is MutualChoice:
            cuts = zip(spec.calibration, groups, strict=False)  # there are none before it is calibrated
            spec = spec.with_(calibration=tuple(cut * float(group[0]) for cut, group in cuts))
        return spec, tensors
    if type(rule) is MutualChoice and spec.calibration and not spec.select_by_decoder_norm:
        cuts = torch.tensor(spec.calibration).to(factor).repeat_interleave(len(groups[0]))
        tensors = {**tensors, "threshold": (cuts * factor).float()}
        return spec.with_(selection=JumpReLU(), calibration=()), tensors
    if type(rule) in ALONE:
        return spec, tensors
    way = "fold_decoder_norm first" if spec.select_by_decoder_norm else "select_by_decoder_norm or one factor for all"
    raise ConfigError(
        f"selection: {name!r} compares latents with each other, and this fold would multiply them by "
        f"{float(factor.min()):.4g} to {float(factor.max()):.4g}; it needs {way}"
    )


def _described(
    spec: CoderSpec, into: Float[Tensor, "d_in"], out: Float[Tensor, "d_out"], latents: Float[Tensor, "d_sae"]
) -> CoderSpec:
    """Returns the spec with what it says of a coder that is rescaled, beside its thresholds."""
    rule, one = spec.selection, float(latents[0]) if alike(latents) else 0.0  # 0: of each its own
    decoder_stays = alike(one * out, 1.0)
    changes: dict[str, Any] = {"decoder_norm": spec.decoder_norm if decoder_stays else "free"}
    if spec.variance is not None:
        changes["variance"] = spec.variance / float(out[0]) ** 2 if alike(out) else None
    if isinstance(rule, MatchingPursuit):
        if not decoder_stays or not alike(one * into, 1.0):
            raise ConfigError(
                "selection: 'matching_pursuit' encodes by its decoder, whose rows must stay; of these folds it allows "
                "that of one scale, with units='raw'"
            )
        changes["selection"] = replace(rule, residual_threshold=rule.residual_threshold * one)
    if isinstance(rule, GradientTopK) and one:  # by which the effects |<g, W_dec_i>| are divided
        beta = rule.beta * one if rule.gradient_norm == "none" else rule.beta
        changes |= {"selection": replace(rule, beta=beta), "calibration": tuple(c / one for c in spec.calibration)}
    elif isinstance(rule, GradientTopK):
        if rule.inference == "gradient":
            raise ConfigError("selection.inference: 'gradient' looks at |<g, W_dec_i>|, which this fold would change")
        changes["calibration"] = ()  # the mean effect of other decoders
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


def alike(factors: Float[Tensor, "m"], *more: float) -> bool:
    """Returns whether factors, and some more numbers, are one but for rounding."""
    least, most = min(float(factors.min()), *more, torch.inf), max(float(factors.max()), *more, -torch.inf)
    return most - least <= ALIKE * most


def ratio(new: Float[Tensor, "d_sae"], old: Float[Tensor, "d_sae"]) -> Float[Tensor, "d_sae"]:
    """Returns new / old, 1 where old is 0."""
    return torch.where(old > 0, new / old, 1.0)


def exact(tensor: Tensor) -> torch.dtype:
    """Returns the precision of a folded tensor: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def times(tensor: Tensor, factor: Tensor) -> Tensor:
    """Returns a product in the precision of a folded tensor."""
    return tensor.to(exact(tensor)) * factor.to(exact(tensor))


def _narrow(factors: Float[Tensor, "layers width"]) -> Float[Tensor, "layers some"]:
    """Returns one column where all are equal: a product with it takes no memory."""
    return factors[:, :1] if bool((factors == factors[:, :1]).all()) else factors
