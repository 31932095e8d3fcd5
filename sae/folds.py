"""Folding: the same map written with other tensors. Pure functions of (spec, tensors) -> (spec, tensors).

    scale           x s, out / s         W_enc s, W_dec / s, b_dec / s, b_pre / s
      of raw units  and latents / s      W_enc, W_dec, b_enc / s, b_dec / s, b_pre / s, threshold / s, b_mag / s
                                         (a transcoder's W_dec times s_in / s_out, its b_dec / s_out)
    decoder norm    n_i = |W_dec_i|      W_enc_i n_i, b_enc_i n_i, threshold_i n_i, b_mag_i n_i, W_dec_i / n_i
    whitening       (x - m) M            W_enc M^T, W_dec M^-1, b_dec M^-1 + m, b_pre M^-1 + m; without pre-bias
                                         b_enc - W_enc M^T m
    token norm      x - mean(x) 1        W_enc (I - 1 1^T / d), W_skip + 1 1^T / d, the pre-bias in b_enc
    pre-bias        x - p                b_enc - W_enc p

A gated coder's b_mag takes exp(r_mag) times what is added to b_enc. W_skip is of raw inputs and outputs: no scale
changes it. Encoder "glu" has its h multiplied by a gate, which sees the same inputs: factors of inputs are in W_glu
too, factors of latents in W_enc and b_enc alone.

A fold that multiplies what selection compares takes thresholds along: per-latent tensors, and the numbers in
`spec.calibration`. A rule that compares latents with each other allows one factor for all of them only, and is refused
otherwise. A calibrated mutual choice whose latents get factors of their own becomes JumpReLU, which is what it is at
inference. Constants of training (JumpReLU's bandwidth) stay as they are. `spec.variance` follows a scale and is dropped
where the fold leaves it unknown; `spec.metrics` and `spec.training` tell of the coder before.

No format folds what it reads: a loaded coder has the tensors of its files, and `SparseCoder.fold_*` is asked for.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.errors import ConfigError
from sae.normalization import Normalization
from sae.selection import Selection
from sae.selection.feature_choice import NEVER, FeatureChoice
from sae.selection.gated import Gated
from sae.selection.gradient_topk import GradientTopK
from sae.selection.groupmax import GroupMax
from sae.selection.jumprelu import JumpReLU
from sae.selection.matching_pursuit import MatchingPursuit
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK
from sae.settings import choose
from sae.spec import CoderSpec, Site, columns_of

if TYPE_CHECKING:
    from typing import Self

Coder = tuple[CoderSpec, dict[str, Tensor]]
UNITS = ("normalized", "raw")
ALIKE = 1e-6  # factors that differ by less are one factor: what float32 leaves of rows that were divided by their norm
ROWS_AT_ONCE = 2**14  # of a matrix that is multiplied in float64


class Folding(nn.Module):
    """The folds as methods. Each returns a new coder, in float32 if this one is in bfloat16; nothing changes in place.

    Tensors that a fold leaves alone are shared. A fold that has nothing to do returns an equal coder; ConfigError says
    why one is not possible.
    """

    spec: CoderSpec

    def fold_scale(self, units: str = "normalized") -> "Self":
        """Returns the coder without normalization "scalar": its latents are the same ("normalized") or in raw units.

        "raw" keeps W_enc (and, of an autoencoder, W_dec) and divides the values of latents by the factor of their inputs.
        """
        return self._folded(scale, units)

    def fold_decoder_norm(self) -> "Self":
        """Returns the coder with decoder rows of norm 1 and latents multiplied by the norms they had.

        A latent that writes to several layers has one norm over all of them. Rows of norm 0 stay, and their latents; but
        where selection compared h_i |W_dec_i|, which is 0 for them, their latents become 0.
        """
        return self._folded(decoder_norm)

    def fold_whitening(self, mean: Float[Tensor, "d"], matrix: Float[Tensor, "d d"], inverse: Tensor) -> "Self":
        """Returns this coder of whitened inputs (x - mean) matrix as one of raw inputs x."""
        return self._folded(whitening, mean, matrix, inverse)

    def fold_token_norm(self, unbiased: bool | None = None) -> "Self":
        """Returns the coder without normalization "center", which becomes part of W_enc and of a skip path.

        `unbiased` is for "layer_norm", and says which standard deviation that is to divide by from now on.
        """
        return self._folded(token_norm, unbiased)

    def fold_pre_bias(self) -> "Self":
        """Returns the coder with its pre-bias in b_enc."""
        return self._folded(pre_bias)

    def _folded(self, fold: Callable[..., Coder], *args: Any) -> "Self":
        spec, tensors = fold(self.spec, {name: t.detach() for name, t in self.state_dict().items()}, *args)
        with torch.device("meta"):
            coder = type(self)(spec)
        whole = {name: tensor.to(_exact(tensor)) for name, tensor in tensors.items()}
        coder.load_state_dict(whole, assign=True)
        return coder.requires_grad_(False).eval()


def scale(spec: CoderSpec, tensors: dict[str, Tensor], units: str = "normalized") -> Coder:
    """Returns the coder of raw inputs: `Folding.fold_scale`."""
    choose("units", units, UNITS)
    kind = spec.normalization.kind
    if kind == "none":
        return spec, tensors
    if kind != "scalar":
        raise ConfigError(f"normalization.kind: {kind!r} is no constant factor; fold_scale folds 'scalar'")
    own = (_columns(spec, sites, width) for sites, width in ((spec.reads, spec.d_in), (spec.writes, spec.d_out)))
    into, out = (column.to(tensors["W_enc"].device) for column in own)
    latents = torch.ones_like(into[:1]).expand(spec.d_sae)
    if units == "raw":
        seen = into.view(spec.n_blocks, -1)  # the inputs of every block of latents
        if not all(map(_alike, seen)):
            found = ", ".join(f"{value:g}" for value in seen.unique().tolist())
            raise ConfigError(f"units: 'raw' needs one factor for all that a latent reads, not {found}; use 'normalized'")
        latents = 1 / seen[:, 0].repeat_interleave(spec.d_sae // spec.n_blocks)
    spec, tensors = _rescaled(spec, tensors, into, out, latents)
    reads, writes = (tuple(replace(site, scale=1.0) for site in sites) for sites in (spec.reads, spec.writes))
    return spec.with_(normalization=Normalization(), reads=reads, writes=writes), tensors


def decoder_norm(spec: CoderSpec, tensors: dict[str, Tensor]) -> Coder:
    """Returns the coder with a unit decoder: `Folding.fold_decoder_norm`."""
    norms = _norms(spec, tensors)
    norms = torch.where(norms > 0, norms, 0.0 if spec.select_by_decoder_norm else 1.0)
    ones = [norms.new_ones(width) for width in (spec.d_in, spec.d_out)]
    spec, tensors = _rescaled(spec, tensors, ones[0], ones[1], norms)
    return spec.with_(select_by_decoder_norm=False), tensors


def whitening(
    spec: CoderSpec,
    tensors: dict[str, Tensor],
    mean: Float[Tensor, "d"],
    matrix: Float[Tensor, "d d"],
    inverse: Float[Tensor, "d d"],
) -> Coder:
    """Returns a coder of whitened inputs (x - mean) matrix as one of raw inputs x (2511.13981).

    The pre-bias stays what it is. Refused are a skip path, which would have to be whitened too, and coders whose inputs
    and outputs are not whitened by the same numbers.
    """
    kind = spec.normalization.kind
    for field, value, refused in (
        ("cross_layer", True, spec.cross_layer),
        ("skip", True, spec.skip),
        ("encoder", spec.encoder, spec.selection.pursues),
        ("normalization.kind", kind, kind != "none"),
        ("writes", [site.name for site in spec.writes], not spec.is_autoencoder),
    ):
        if refused:
            raise ConfigError(f"{field}: {value!r} does not go with whitening, which is of an autoencoder's raw inputs")
    mean, matrix, inverse = (tensor.to(tensors["W_enc"].device).double() for tensor in (mean, matrix, inverse))
    error = float((matrix @ inverse - torch.eye(len(mean), device=mean.device)).abs().max())
    if not error < 1e-2:
        raise ConfigError(f"inverse: it is not that of the whitening matrix; their product is off by {error:.2g}")
    made = {name: _whole(tensors[name] @ matrix.T) if False else _product(tensors[name], matrix.T) for name in ()}
    return spec, made
