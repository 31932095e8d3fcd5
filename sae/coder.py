"""SparseCoder: encode, decode, forward. The map itself is written at the head of `sae/spec.py`."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae import kernels
from sae.normalization import undo
from sae.seeding import generator
from sae.spec import CoderSpec, SparseLatents

CHUNK_ENTRIES = 2**26  # largest [tokens, d_sae] product held at once outside training: 256 MiB in float32


class CoderOutput(NamedTuple):
    """What a coder makes of activations."""

    out: Float[Tensor, "*shape d_out"]
    """The reconstruction (or prediction), the skip path included."""
    latents: SparseLatents


@dataclass(frozen=True)
class Pass:
    """One differentiable pass over n tokens in the normalized space, with what the objectives need of it."""

    y: Float[Tensor, "n d_in"]
    """N(x) - p, the encoder's input."""
    scores: Float[Tensor, "n d_sae"]
    """All pre-activations, without gradient; lives for the step only."""
    latents: SparseLatents
    prediction: Float[Tensor, "n d_out"]
    """The output before N^-1."""


class SparseCoder(nn.Module):
    """A sparse autoencoder or transcoder with one latent per row.

    Tensors: W_enc [d_sae, d_in], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]; b_pre [d_in] and
    W_skip [d_out, d_in] where `spec` has them.
    """

    def __init__(self, spec: CoderSpec, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        shapes = {
            "W_enc": (spec.d_sae, spec.d_in),
            "b_enc": (spec.d_sae,),
            "W_dec": (spec.d_sae, spec.d_out),
            "b_dec": (spec.d_out,),
        }
        if spec.pre_bias == "own":
            shapes["b_pre"] = (spec.d_in,)
        if spec.skip:
            shapes["W_skip"] = (spec.d_out, spec.d_in)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)))

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    b_pre: nn.Parameter
    W_skip: nn.Parameter

    def encode(self, x: Float[Tensor, "*shape d_in"]) -> SparseLatents:
        """Returns the codes of x by the per-token inference rule, without gradient; token order as x flattened."""
        with torch.no_grad():
            rows = self._rows(x)
            size = max(1, CHUNK_ENTRIES // self.spec.d_sae)
            parts = [self._codes(chunk)[-1] for chunk in rows.split(size)] if len(rows) else []
        return _concatenate(parts, self.spec.d_sae, tuple(x.shape[:-1]), x)

    def decode(
        self, latents: SparseLatents, x: Float[Tensor, "*shape d_in"] | None = None
    ) -> Float[Tensor, "*shape d_out"]:
        """Returns the reconstruction from codes, without the skip path.

        Per-token normalization is undone with the statistics of `x`, which must then be given (ValueError).
        """
        out = kernels.decode(latents.values, self.W_dec, latents.offsets, latents.ids) + self.b_dec
        if self.spec.normalization.kind in ("layer_norm", "l2"):
            if x is None:
                raise ValueError(f"decode: normalization {self.spec.normalization.kind!r} is undone per token; pass x")
            out = undo(out, self.spec.normalization.apply(self._rows(x))[1])
        elif self.spec.normalization.kind == "scalar":
            out = out / self.spec.normalization.scale
        return out if latents.shape is None else out.reshape(*latents.shape, self.spec.d_out)

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> CoderOutput:
        """Returns (out, latents) of x, differentiable unless gradients are off."""
        rows = self._rows(x)
        latents = self._codes(rows)[-1] if torch.is_grad_enabled() and len(rows) else self.encode(rows)
        out = self.decode(latents, rows).reshape(*x.shape[:-1], self.spec.d_out)
        if self.spec.skip:
            out = out + x.to(self.W_skip) @ self.W_skip.T
        return CoderOutput(out, _reshaped(latents, tuple(x.shape[:-1])))

    def run(self, x: Float[Tensor, "n d_in"], product_dtype: torch.dtype | None = None) -> Pass:
        """Returns one pass over rows x, differentiable in the parameters at the support.

        `product_dtype` (bfloat16) is the precision of the dense encoder product that selection looks at; the kept
        values are then computed again in the parameters' precision, so it can change which latents are kept only.
        """
        x = x.to(self.W_enc)
        y, (_, spread), scores, latents = self._codes(x, product_dtype)
        prediction = kernels.decode(latents.values, self.W_dec, latents.offsets, latents.ids) + self.b_dec
        if self.spec.skip:
            prediction = prediction + (x @ self.W_skip.T) / spread  # N^-1 gives it back its size
        return Pass(y, scores, latents, prediction)

    def _codes(
        self, x: Float[Tensor, "n d_in"], product_dtype: torch.dtype | None = None
    ) -> tuple[Float[Tensor, "n d_in"], tuple[Any, Any], Float[Tensor, "n d_sae"], SparseLatents]:
        """Returns the encoder's input, what undoes the normalization, all pre-activations, and the codes of rows x."""
        y, how = self.spec.normalization.apply(x)
        if self.spec.pre_bias != "none":
            y = y - (self.b_dec if self.spec.pre_bias == "decoder" else self.b_pre)
        scores = self.preactivations(y, product_dtype)
        with torch.no_grad():
            compared = scores * self.W_dec.norm(dim=1) if self.spec.select_by_decoder_norm else scores
            offsets, ids = self.spec.selection.support(compared)
        exact = None if product_dtype not in (None, self.W_enc.dtype) else scores
        kept = kernels.encode_at(y, self.W_enc, self.b_enc, offsets, ids, exact)
        latents = SparseLatents(offsets, ids, self.spec.selection.activate(kept), self.spec.d_sae, (len(x),))
        return y, how, scores, latents

    @torch.no_grad()
    def preactivations(
        self, y: Float[Tensor, "n d_in"], product_dtype: torch.dtype | None = None
    ) -> Float[Tensor, "n d_sae"]:
        """Returns y W_enc^T + b_enc without gradient, the product taken in `product_dtype`."""
        dtype = product_dtype or self.W_enc.dtype
        return torch.nn.functional.linear(y.to(dtype), self.W_enc.to(dtype), self.b_enc.to(dtype)).to(y.dtype)

    def _rows(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "n d_in"]:
        if x.shape[-1] != self.spec.d_in:
            raise ValueError(f"x: last dimension is {x.shape[-1]}, but this coder has d_in = {self.spec.d_in}")
        return x.reshape(-1, self.spec.d_in).to(self.W_enc)


def initialize(coder: SparseCoder, center: Float[Tensor, "d_out"], seed: int, *key: str | int) -> None:
    """Starts a coder as TopK scaling does (Gao 2024, arXiv 2406.04093, appendix A).

    Rows of W_dec are random unit vectors, W_enc is their copy (the tied start keeps latents alive), b_enc is zero and
    b_dec is `center`, the mean or geometric median of the normalized training activations.
    """
    spec = coder.spec
    rows = torch.randn(spec.d_sae, spec.d_in, generator=generator(seed, "init", *key))
    rows = rows / rows.norm(dim=1, keepdim=True)
    with torch.no_grad():
        coder.W_enc.copy_(rows)
        if spec.d_in == spec.d_out:
            coder.W_dec.copy_(rows)
        coder.b_dec.copy_(center)


def _reshaped(latents: SparseLatents, shape: tuple[int, ...]) -> SparseLatents:
    return SparseLatents(latents.offsets, latents.ids, latents.values, latents.d_sae, shape)


def _concatenate(parts: list[SparseLatents], d_sae: int, shape: tuple[int, ...], like: Tensor) -> SparseLatents:
    if not parts:
        empty = torch.zeros(0, dtype=torch.long, device=like.device)
        return SparseLatents(empty.new_zeros(1), empty, like.new_zeros(0), d_sae, shape)
    starts = [0, *torch.tensor([part.ids.numel() for part in parts]).cumsum(0).tolist()]
    offsets = [parts[0].offsets[:1]] + [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    ids, values = torch.cat([part.ids for part in parts]), torch.cat([part.values for part in parts])
    return SparseLatents(torch.cat(offsets), ids, values, d_sae, shape)
