"""Folding: the same map written with other tensors. Pure functions of (spec, tensors) -> (spec, tensors).

    scale           x s, out / s         W_enc s, W_dec / s, b_dec / s, b_pre / s
      raw units     latents / s as well  b_enc / s, b_dec / s, b_pre / s, threshold / s, b_mag / s; W_enc, W_dec stay
                                         (a transcoder's W_dec times s_in / s_out, its b_dec / s_out)
    decoder norm    n_i = |W_dec_i|      W_enc_i n_i, b_enc_i n_i, threshold_i n_i, b_mag_i n_i, W_dec_i / n_i
    whitening       (x - m) M            W_enc M^T, W_dec M^-1, b_dec M^-1 + m, b_pre M^-1 + m; without pre-bias
                                         b_enc - W_enc M^T m
    token norm      x - mean(x) 1        W_enc (I - 1 1^T / d), W_skip + 1 1^T / d, the pre-bias in b_enc
    pre-bias        x - p                b_enc - W_enc p

W_skip is of raw inputs and outputs: no scale changes it. What is said of W_enc holds for all matrices through which an
encoder sees its input; which of them take factors of latents, it says (`sae/encoders/`), and a selection rule says what
becomes of its tensors, its constants and `spec.calibration` (`sae/selection/`), or that a fold cannot be. Constants of
training (JumpReLU's bandwidth) stay. `spec.variance` follows a scale, and is dropped where a fold leaves it unknown;
`spec.metrics` and `spec.training` tell of the coder before.

No format folds what is only named in its config: a loaded coder is as it was released until `SparseCoder.fold_*` is
called.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.settings import choose
from sae.base.sums import summed_on
from sae.coder.normalization import Normalization
from sae.coder.rescaling import Coder, encoder_factors, norms, recompared, rescaled, rows_of_decoder, rule_tensors
from sae.coder.spec import CoderSpec
from sae.coder.tensors import CoderTensors
from sae.kernels.scaling import alike, exact, ratio, times
from sae.lm.site import Site

if TYPE_CHECKING:
    from typing import Self

UNITS = ("normalized", "raw")
ROWS_AT_ONCE = 2**14  # of a matrix that is multiplied in float64
WHY_NOT = {
    "scalar": "is one factor for all tokens; fold_scale folds it",
    "l2": "divides every token by its own norm, which no constant tensor does",
    "layer_norm": "divides every token by its own deviation, which no constant tensor does; unbiased=True or False "
    "says which deviation",
}


class Folding(CoderTensors):
    """The folds as methods. Each returns a new coder, in float32 if this one is in bfloat16; nothing changes in place.

    Tensors that a fold leaves alone are shared. A fold that has nothing to do returns an equal coder; ConfigError says
    why one is not possible.
    """

    def fold_scale(self, units: str = "normalized") -> "Self":
        """Returns the coder without normalization "scalar": its latents are the same ("normalized") or in raw units.

        "raw" keeps W_enc, and divides the values of latents by the factor of their inputs.
        """
        return self._folded(scale, units)

    def fold_decoder_norm(self) -> "Self":
        """Returns the coder with decoder rows of norm 1, its latents multiplied by the norms that they had.

        A latent that writes to several layers has one norm over all of them. Rows of norm 0 stay, and their latents;
        but where selection compared h_i |W_dec_i|, which is 0 for them, their latents become 0.
        """
        return self._folded(decoder_norm)

    def fold_whitening(
        self, mean: Float[Tensor, "_d"], matrix: Float[Tensor, "d d"], inverse: Float[Tensor, "d d"]
    ) -> "Self":
        """Returns this coder of whitened inputs (x - mean) matrix as one of raw inputs x, with the same latents."""
        return self._folded(whitening, mean, matrix, inverse)

    def fold_token_norm(self, unbiased: bool | None = None) -> "Self":
        """Returns the coder without normalization "center", which goes into W_enc and a skip path.

        `unbiased` is for "layer_norm": which standard deviation it is to divide by from now on, with the same result.
        """
        return self._folded(token_norm, unbiased)

    def fold_pre_bias(self) -> "Self":
        """Returns the coder with its pre-bias in b_enc, and the same latents."""
        return self._folded(pre_bias)

    def _folded(self, fold: Callable[..., Coder], *args: Any) -> "Self":
        device = self.W_enc.device
        own = {name: t.detach().to(summed_on(device)) for name, t in self.state_dict().items()}
        spec, tensors = fold(self.spec, own, *args)
        coder = type(self)(spec, "meta")
        coder.load_state_dict({name: t.to(device, exact(t)) for name, t in tensors.items()}, assign=True)
        return coder.requires_grad_(False).eval()


def rescale_latents(spec: CoderSpec, tensors: dict[str, Tensor], factor: Float[Tensor, "d_sae"]) -> Coder:
    """Returns the coder whose latents are `factor` times as large, and whose output is the same.

    A rule that compares latents with each other now compares them in these units: choose otherwise and the map changes.
    """
    n = factor.float()
    latent, _ = rows_of_decoder(spec, n.device)
    changes = {**encoder_factors(spec, n), "W_dec": 1 / n[latent, None]}
    changed = {name: times(t, changes[name]) if name in changes else t for name, t in tensors.items()}
    return spec, spec.selection.in_units(changed, n, n)


def scale(spec: CoderSpec, tensors: dict[str, Tensor], units: str = "normalized") -> Coder:
    """Returns the coder of raw inputs: `Folding.fold_scale`."""
    choose("units", units, UNITS)
    kind = spec.normalization.kind
    if kind == "none":
        return spec, tensors
    if kind != "scalar":
        raise ConfigError(f"normalization.kind: {kind!r} is no constant factor; fold_scale folds 'scalar'")
    device, blocks = tensors["W_enc"].device, spec.n_blocks
    into, out = _factors(spec, spec.reads, spec.d_in, device), _factors(spec, spec.writes, spec.d_out, device)
    latents = into.new_ones(spec.d_sae)
    if units == "raw":
        seen = into.view(blocks, -1)  # by each block of latents
        if not all(map(alike, seen)):
            found = ", ".join(f"{value:g}" for value in seen.unique().tolist())
            raise ConfigError(f"units: 'raw' needs one factor for all that a latent reads, not {found}")
        latents = 1 / seen[:, 0].repeat_interleave(spec.d_sae // blocks)
    spec, tensors = rescaled(spec, tensors, into, out, latents)
    reads, writes = (tuple(replace(site, scale=1.0) for site in sites) for sites in (spec.reads, spec.writes))
    return spec.with_(normalization=Normalization(), reads=reads, writes=writes), tensors


def decoder_norm(spec: CoderSpec, tensors: dict[str, Tensor]) -> Coder:
    """Returns the coder with a unit decoder: `Folding.fold_decoder_norm`."""
    n = norms(spec, tensors)
    n[n == 0] = 0.0 if spec.select_by_decoder_norm else 1.0
    spec, tensors = rescaled(spec, tensors, n.new_ones(spec.d_in), n.new_ones(spec.d_out), n)
    return spec.with_(select_by_decoder_norm=False), tensors


def whitening(
    spec: CoderSpec,
    tensors: dict[str, Tensor],
    mean: Float[Tensor, "_d"],
    matrix: Float[Tensor, "d d"],
    inverse: Float[Tensor, "d d"],
) -> Coder:
    """Returns a coder of whitened inputs (x - mean) matrix as one of raw inputs x (2511.13981).

    The pre-bias stays of its kind. Refused are a skip path, which would have to be whitened as well, and coders whose
    inputs and outputs are not of the same sites.
    """
    d, kind = spec.d_in, spec.normalization.kind
    refused = {
        "cross_layer": (spec.cross_layer, True),
        "skip": (spec.skip, True),
        "encoder": (spec.encoding.pursues, spec.encoder),
        "normalization.kind": (kind != "none", kind),
        "writes": (not spec.is_autoencoder, [site.name for site in spec.writes]),
    }
    for field, (wrong, value) in refused.items():
        if wrong:
            raise ConfigError(f"{field}: {value!r} does not go with whitening, which is of an autoencoder's raw inputs")
    for name, tensor, shape in (("mean", mean, (d,)), ("matrix", matrix, (d, d)), ("inverse", inverse, (d, d))):
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"{name}: its shape is {tuple(tensor.shape)}; whitening of d_in = {d} needs {shape}")
    mean, matrix, inverse = (tensor.to(tensors["W_enc"].device).double() for tensor in (mean, matrix, inverse))
    error = float((matrix @ inverse - torch.eye(d).to(matrix)).abs().max())
    if not error < 1e-2:
        raise ConfigError(f"inverse: it is not that of the whitening matrix; their product is off by {error:.2g}")
    changed = {name: _product(tensors[name], matrix.T) for name in spec.encoding.maps}
    changed["W_dec"] = _product(tensors["W_dec"], inverse)
    for name in {"b_dec", "b_pre"} & tensors.keys():
        changed[name] = (tensors[name].double() @ inverse + mean).to(exact(tensors[name]))
    folded = {**tensors, **changed}
    if spec.pre_bias == "none":
        folded = _moved(spec, folded, mean)
    factor = mean.new_ones(spec.d_sae)
    if spec.select_by_decoder_norm:
        factor = ratio(norms(spec, folded), norms(spec, tensors))
    return recompared(spec.with_(variance=None, decoder_norm="free"), folded, mean.new_ones(spec.d_sae), factor)


def token_norm(spec: CoderSpec, tensors: dict[str, Tensor], unbiased: bool | None = None) -> Coder:
    """Returns the coder without centering, or with another deviation: `Folding.fold_token_norm`."""
    kind = spec.normalization.kind
    if unbiased is not None:
        if kind != "layer_norm":
            raise ConfigError(f"unbiased: {unbiased} is of normalization 'layer_norm', not of {kind!r}")
        return _deviation(spec, tensors, unbiased)
    if kind == "none":
        return spec, tensors
    if kind != "center":
        raise ConfigError(f"normalization.kind: {kind!r} {WHY_NOT[kind]}")
    if spec.encoding.pursues:
        raise ConfigError(f"encoder: {spec.encoder!r} encodes by its decoder, which cannot take up the centering")
    spec, tensors = pre_bias(spec, tensors)
    layers = spec.n_blocks
    widths = [spec.d_in // layers] if layers > 1 else _widths(spec)
    squares = [torch.full((w, w), 1 / w, device=tensors["b_dec"].device) for w in widths]
    mean = squares[0].repeat(layers, 1) if layers > 1 else torch.block_diag(*squares)
    folded = {**tensors, "W_skip": _plus(tensors["W_skip"], mean) if spec.skip else mean.to(exact(tensors["b_dec"]))}
    for name in spec.encoding.maps:
        parts = tensors[name].split(widths, dim=1)
        folded[name] = torch.cat([_plus(part, -part.double().mean(1, keepdim=True)) for part in parts], dim=1)
    return spec.with_(normalization=Normalization(), skip=True, variance=None), folded


def pre_bias(spec: CoderSpec, tensors: dict[str, Tensor]) -> Coder:
    """Returns the coder without pre-bias: `Folding.fold_pre_bias`."""
    if spec.pre_bias == "none":
        return spec, tensors
    if spec.encoding.pursues:
        raise ConfigError(f"pre_bias: {spec.pre_bias!r} cannot go into b_enc, which {spec.encoder} does not have")
    folded = _moved(spec, tensors, tensors["b_dec" if spec.pre_bias == "decoder" else "b_pre"])
    folded.pop("b_pre", None)
    return spec.with_(pre_bias="none"), folded


def _deviation(spec: CoderSpec, tensors: dict[str, Tensor], unbiased: bool) -> Coder:
    """Returns the coder with layer_norm's other deviation q s: x / (s + eps) = q x / (q s + q eps)."""
    if spec.normalization.unbiased == unbiased:
        return spec, tensors
    widths = set(_widths(spec))
    if len(widths) > 1:
        raise ConfigError(f"unbiased: one eps does not do for sites of different widths {sorted(widths)}")
    d = widths.pop()
    q = (d / (d - 1)) ** (0.5 if unbiased else -0.5)
    both = torch.full((spec.d_in,), q, dtype=torch.float64, device=tensors["W_enc"].device)
    out = both if spec.normalization.undone else both.new_ones(spec.d_out)
    spec, tensors = rescaled(spec, tensors, both, out, both.new_ones(spec.d_sae))
    how = replace(spec.normalization, unbiased=unbiased, eps=q * spec.normalization.eps)
    return spec.with_(normalization=how), tensors


def _moved(spec: CoderSpec, tensors: dict[str, Tensor], shift: Float[Tensor, "d_in"]) -> dict[str, Tensor]:
    """Returns the tensors of a coder that has its inputs less `shift`, for the inputs as they are."""
    moved = dict(tensors)
    for weight, bias in spec.encoding.maps.items():
        parts = zip(tensors[weight].chunk(spec.n_blocks), shift.double().chunk(spec.n_blocks), strict=True)
        change = -torch.cat([rows.double() @ part for m, part in parts for rows in m.split(ROWS_AT_ONCE)])
        moved[bias] = _plus(tensors[bias], change)
        if weight == "W_enc":
            moved |= spec.selection.moved({name: tensors[name] for name in rule_tensors(spec)}, change)
    return moved


def _widths(spec: CoderSpec) -> list[int]:
    return [site.width for site in spec.reads] if len(spec.reads) > 1 else [spec.d_in]


def _factors(spec: CoderSpec, sites: tuple[Site, ...], width: int, device: torch.device) -> Float[Tensor, "width"]:
    """Returns what each column is multiplied by under normalization "scalar", in float64."""
    own = [(site.width if len(sites) > 1 else width, site.scale) for site in sites] or [(width, 1.0)]
    parts = [torch.full((n,), spec.normalization.scale * s, dtype=torch.float64, device=device) for n, s in own]
    return torch.cat(parts)


def _plus(tensor: Tensor, more: Tensor) -> Tensor:
    return (tensor.double() + more).to(exact(tensor))


def _product(weight: Float[Tensor, "m d"], matrix: Float[Tensor, "d d2"]) -> Float[Tensor, "m d2"]:
    return torch.cat([(rows.double() @ matrix).to(exact(weight)) for rows in weight.split(ROWS_AT_ONCE)])
