"""SparseCoder: encode, decode, forward. The map itself is written at the head of `sae/coder/spec.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import kernels
from sae.coder import partial
from sae.coder.folds import Folding
from sae.coder.normalization import Undo, undo
from sae.coder.published import Published
from sae.coder.wording import description, kind, known_figures, summary
from sae.kernels.codes import Entries, SparseLatents, Support, flat, offsets_of, rows_of
from sae.pages.notebook import table

CHUNK_ENTRIES = 2**26  # largest [tokens, d_sae] product held at once outside training: 256 MiB in float32


class CoderOutput(NamedTuple):
    """What a coder makes of activations."""

    out: Float[Tensor, "*shape d_out"]
    """The reconstruction (or prediction), the skip path included."""
    latents: SparseLatents


class Look(NamedTuple):
    """n tokens as selection sees them."""

    x: Float[Tensor, "n d_in"]
    y: Float[Tensor, "n d_in"]
    """N(x) - p, the encoder's input."""
    how: Undo
    """What undoes the normalization of an output."""
    scores: Float[Tensor, "n d_sae"]
    """All pre-activations, without gradient; lives for the step only."""


@dataclass(frozen=True)
class Pass:
    """One differentiable pass over n tokens in the normalized space, with what the objectives need of it."""

    y: Float[Tensor, "n d_in"]
    """N(x) - p, the encoder's input."""
    scores: Float[Tensor, "n d_sae"]
    """All pre-activations, without gradient."""
    kept: Float[Tensor, "nnz"]
    """The pre-activations at the support."""
    latents: SparseLatents
    rest: Float[Tensor, "n d_out"]
    """What the latents do not make of the prediction: the bias and the skip path."""
    prediction: Float[Tensor, "n d_out"]
    """The output before N^-1."""
    how: Undo
    """What undoes the normalization of the prediction."""


class SparseCoder(Published, Folding):
    """A sparse autoencoder, transcoder or crosscoder: the map that its tensors (`CoderTensors`) make.

    Activations are tensors, arrays or lists of numbers with d_in in the last dimension; TypeError names anything else.
    """

    def extra_repr(self) -> str:
        """Returns what the coder is, in one line."""
        return summary(self.spec, self.per_latent().get("threshold"))

    def _repr_html_(self) -> str:
        figures = [(name, f"{value:.4g}") for name, value in known_figures(self.spec)]
        weights = [("weights", f"{str(self.dtype).removeprefix('torch.')} on {self.device}")]
        return f"<b>{kind(self.spec)}</b>{table((), [*description(self.spec), *figures, *weights])}"

    def encode(
        self,
        x: Float[Tensor, "*shape d_in"] | Any,
        gradients: Float[Tensor, "*shape d_out"] | None = None,
        latents: Sequence[int] | Int[Tensor, "m"] | None = None,
    ) -> SparseLatents:
        """Returns the codes of x by the per-token inference rule, without gradient; token order as x flattened.

        `gradients` is what a rule whose inference is "gradient" looks at beside x (ValueError without), and no other.
        With `latents`, some ids, their entries alone, to rounding; no more is read than that takes (`partial.py`).
        """
        x = as_floats(x)
        if latents is not None:
            rows = self._rows(x, torch.promote_types(self.W_enc.dtype, torch.float32))
            beside = None if gradients is None else gradients.reshape(-1, self.spec.d_out)
            whole = gradients is not None or self.spec.rule.looks_at_gradients or self.spec.encoding.pursues
            found = partial.encode(self, rows, latents, whole, lambda: self.encode(rows, beside))
            return replace(found, leading=tuple(x.shape[:-1]))
        with torch.no_grad():
            rows, size = self._rows(x), max(1, CHUNK_ENTRIES // self.spec.d_sae)
            looked = [None] * len(rows.split(size))
            beside = looked if gradients is None else gradients.reshape(-1, self.spec.d_out).to(rows).split(size)
            chunks = zip(rows.split(size), beside, strict=True)
            parts = [self._inferred(chunk, g) for chunk, g in chunks] if len(rows) else []
        return _concatenate(parts, self.spec.d_sae, tuple(x.shape[:-1]), x)

    def encode_dense(
        self, x: Float[Tensor, "*shape d_in"] | Any, gradients: Float[Tensor, "*shape d_out"] | None = None
    ) -> Float[Tensor, "*shape d_sae"]:
        """Returns the codes of x as a dense tensor, of d_sae numbers a token: `encode(x).to_dense()`.

        Differentiable like `forward`, at the latents that are kept, unless gradients are off; `gradients` as in
        `encode`.
        """
        x = as_floats(x)
        return self._latents(self._rows(x), gradients).to_dense().reshape(*x.shape[:-1], self.spec.d_sae)

    def decode(
        self,
        latents: SparseLatents | Float[Tensor, "*shape d_sae"] | Any,
        x: Float[Tensor, "*shape d_in"] | Any | None = None,
    ) -> Float[Tensor, "*shape d_out"]:
        """Returns the reconstruction from codes, sparse or dense, without the skip path.

        Per-token normalization is undone with the statistics of `x`, which must then be given (ValueError).
        """
        if not isinstance(latents, SparseLatents):
            latents = SparseLatents.from_dense(
                as_floats(latents, "latents", "codes [..., d_sae]").to(self.b_dec.device)
            )
        if latents.d_sae != self.spec.d_sae:
            raise ValueError(f"latents: they are of {latents.d_sae} latents, but this coder has {self.spec.d_sae}")
        if self.spec.normalization.per_token and x is None:
            kind = self.spec.normalization.kind
            raise ValueError(f"decode: normalization {kind!r} is undone per token; pass x")
        out = self.decoded(latents.values, latents.offsets, latents.ids) + self.b_dec
        like = out.new_zeros(len(out), self.spec.d_in) if x is None else self._rows(as_floats(x))
        out = undo(out, self.spec.normalize(like)[1])
        return out.reshape(*latents.shape[:-1], self.spec.d_out)

    def forward(
        self, x: Float[Tensor, "*shape d_in"] | Any, gradients: Float[Tensor, "*shape d_out"] | None = None
    ) -> CoderOutput:
        """Returns (out, latents) of x, differentiable unless gradients are off; `gradients` as in `encode`."""
        x = as_floats(x)
        rows = self._rows(x)
        latents = self._latents(rows, gradients)
        out = self.decode(latents, rows).reshape(*x.shape[:-1], self.spec.d_out)
        if self.spec.skip:
            out = out + self.skipped(x)
        return CoderOutput(out, replace(latents, leading=tuple(x.shape[:-1])))

    def skipped(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        """Returns what the skip path makes of raw inputs, x W_skip^T; of a cross-layer coder, layer by layer."""
        x, layers = x.to(self.W_skip), self.spec.n_blocks
        parts = zip(x.chunk(layers, dim=-1), self.W_skip.chunk(layers), strict=True)
        return torch.cat([part @ weight.T for part, weight in parts], dim=-1)

    def look(self, x: Float[Tensor, "n d_in"], product_dtype: torch.dtype | None = None) -> Look:
        """Returns rows x as selection sees them, differentiable in y.

        `product_dtype` (bfloat16) is the precision of the dense encoder product; `run` then computes the kept values
        again in the parameters' precision, so it can change which latents are kept only.
        """
        x = x.to(self.W_enc)
        y, how = self.centered(x)
        return Look(x, y, how, self.preactivations(y, product_dtype))

    def run(self, look: Look, support: Support | None = None, exact: bool = True) -> Pass:
        """Returns one pass over what was looked at, differentiable in the parameters at the support.

        Without a support, the per-token rule chooses. `exact` says that the scores have the parameters' precision, so
        that kept ones need not be computed again.
        """
        offsets, ids = self.support(self.compared(look)) if support is None else support
        kept = self.preactivations_at(look.y, offsets, ids, look.scores if exact else None)
        values = self.spec.selection.activate(kept, ids, self.per_latent())
        latents = SparseLatents(offsets, ids, values, self.spec.d_sae, (len(look.x),))
        rest = self.b_dec.expand(len(look.x), -1)
        if self.spec.skip:
            rest = rest + self.skipped(look.x) / look.how[1]  # N^-1 gives it back its size
        prediction = self.decoded(values, offsets, ids) + rest
        return Pass(look.y, look.scores, kept, latents, rest, prediction, look.how)

    @torch.no_grad()
    def preactivations(
        self, y: Float[Tensor, "n d_in"], product_dtype: torch.dtype | None = None
    ) -> Float[Tensor, "n d_sae"]:
        """Returns what the encoder makes of its input, without gradient, the product taken in `product_dtype`."""
        dtype = product_dtype or self.W_enc.dtype
        tensors = {name: tensor.to(dtype) for name, tensor in self.encoder_tensors().items()}
        return self.spec.encoding.preactivations(y.to(dtype), tensors, self.spec.n_blocks).to(y.dtype)

    def preactivations_at(
        self,
        y: Float[Tensor, "n d_in"],
        offsets: Int[Tensor, "n_plus_1"],
        ids: Int[Tensor, "nnz"],
        scores: Float[Tensor, "n d_sae"] | None = None,
    ) -> Float[Tensor, "nnz"]:
        """Returns pre-activations at a support, differentiable; `scores` are all of them, where they are known."""
        layers, n = self.spec.n_blocks, len(y)
        if scores is not None:
            scores = scores.reshape(-1).index_select(0, flat(offsets, ids, scores.shape[1]))
        if layers > 1:  # a row for each (token, layer): ids ascend, so the order of the entries stays
            size = self.spec.d_sae // layers
            rows = rows_of(offsets) * layers + torch.div(ids, size, rounding_mode="floor")
            counts = torch.bincount(rows, minlength=n * layers)
            y, offsets = y.reshape(n * layers, -1), offsets_of(counts)
        return self.spec.encoding.preactivations_at(y, self.encoder_tensors(), offsets, ids, scores)

    def decoded(
        self,
        values: Float[Tensor, "nnz"],
        offsets: Int[Tensor, "n_plus_1"],
        ids: Int[Tensor, "nnz"],
        frozen: bool = False,
    ) -> Float[Tensor, "n d_out"]:
        """Returns codes times decoder, without bias, differentiable in both; in the codes alone where `frozen`."""
        if self.spec.n_blocks == 1:
            return kernels.decode(values, self.W_dec.detach() if frozen else self.W_dec, offsets, ids)
        tokens, n = rows_of(offsets), offsets.numel() - 1
        out = self.W_dec.new_zeros(n, self.spec.d_out)
        for block, weight in zip(self.blocks, self.decoders(frozen), strict=True):
            mine = (ids >= block.latents.start) & (ids < block.latents.stop)
            counts = torch.bincount(tokens[mine], minlength=n)
            starts = offsets_of(counts)
            part = kernels.decode(values[mine], weight, starts, ids[mine] - block.latents.start)
            out = out + torch.nn.functional.pad(part, (block.columns.start, 0))
        return out

    @torch.no_grad()
    def effects(self, gradients: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_sae"]:
        """Returns |<g, W_dec_i>|: to first order, what a unit of each latent changes the loss by."""
        parts = zip(self.blocks, self.decoders(), strict=True)
        return torch.cat([gradients[:, block.columns] @ weight.T for block, weight in parts], dim=1).abs()

    @torch.no_grad()
    def compared(
        self,
        look: Look,
        gradients: Float[Tensor, "n d_in"] | None = None,
        states: list[dict[str, Tensor]] | None = None,
    ) -> Float[Tensor, "n d_sae"]:
        """Returns what selection compares: pre-activations, times decoder norms or augmented where the spec says so.

        `gradients` are those of the loss at the sites written, in the model's own units; `states` what the rule
        remembers of every block.
        """
        scores = look.scores * self.decoder_norms() if self.spec.select_by_decoder_norm else look.scores
        if gradients is None or self.spec.selection.gradient_loss is None:
            return scores
        effects = self.effects(gradients * look.how[1])  # the chain rule, with the normalization taken as constant
        groups = self.rule_groups()
        found = self.spec.calibration or (0.0,) * len(groups)
        states = states or [{"calibration": torch.tensor(calibration)} for calibration in found]
        parts = [self.spec.rule.augment(scores[:, g], effects[:, g], s) for g, s in zip(groups, states, strict=True)]
        return torch.cat(parts, dim=1)

    def support(self, scores: Float[Tensor, "n d_sae"], ask: Callable[..., Support] | None = None) -> Support:
        """Returns the support of compared scores: by the per-token rule, or by `ask(rule, scores, tensors, group)`.

        A cross-layer coder asks once for every block.
        """
        ask = ask or (lambda rule, scores, tensors, group: rule.infer(scores, tensors))
        groups, rule = self.rule_groups(), self.spec.rule
        found = [ask(rule, scores[:, group], self.given(i, group), i) for i, group in enumerate(groups)]
        if len(found) == 1:
            return found[0]
        parts = [(rows_of(offsets), ids + group.start) for group, (offsets, ids) in zip(groups, found, strict=True)]
        tokens, ids = (torch.cat(members) for members in zip(*parts, strict=True))
        return Entries(tokens, ids, ids).to_support(len(scores))

    def _latents(self, rows: Float[Tensor, "n d_in"], gradients: Tensor | None) -> SparseLatents:
        """Returns the codes of rows, differentiable unless gradients are off."""
        beside = None if gradients is None else gradients.reshape(-1, self.spec.d_out).to(rows)
        live = torch.is_grad_enabled() and len(rows)
        return self._inferred(rows, beside) if live else self.encode(rows, beside)

    def _inferred(self, x: Float[Tensor, "n d_in"], gradients: Tensor | None) -> SparseLatents:
        if self.spec.selection.looks_at_gradients:
            if gradients is None:
                raise ValueError("gradients: this coder's selection.inference is 'gradient'; pass those of the loss")
        elif gradients is not None:
            raise ValueError("gradients: this coder's inference looks at none; leave them out")
        if self.spec.encoding.pursues:
            (offsets, ids), values = self.spec.encoding.pursue(self.centered(x)[0], self.W_dec, self.spec.selection)
            return SparseLatents(offsets, ids, values, self.spec.d_sae, (len(x),))
        look = self.look(x)
        return self.run(look, self.support(self.compared(look, gradients))).latents

    def _rows(self, x: Float[Tensor, "*shape d_in"], dtype: torch.dtype | None = None) -> Float[Tensor, "n d_in"]:
        if x.shape[-1] != self.spec.d_in:
            raise ValueError(f"x: last dimension is {x.shape[-1]}, but this coder has d_in = {self.spec.d_in}")
        return x.reshape(-1, self.spec.d_in).to(self.W_enc.device, dtype or self.W_enc.dtype)


def as_floats(x: Any, argument: str = "x", wanted: str = "activations [..., d_in]") -> Tensor:
    """Returns a tensor, an array or a list as a tensor of floats; TypeError says what was given instead."""
    if not isinstance(x, Tensor):
        try:
            x = torch.from_numpy(np.array(x))
        except (TypeError, ValueError):  # text, objects, lists of unequal lengths
            raise TypeError(f"{argument}: expected {wanted}, not a {type(x).__name__}") from None
    if not x.is_floating_point() or not x.ndim:
        hint = "; token ids go through the language model" if argument == "x" else ""
        raise TypeError(f"{argument}: expected {wanted}, not {x.dtype} {list(x.shape)}{hint}")
    return x


def _concatenate(parts: list[SparseLatents], d_sae: int, shape: tuple[int, ...], like: Tensor) -> SparseLatents:
    if not parts:
        empty = torch.zeros(0, dtype=torch.long, device=like.device)
        return SparseLatents(empty.new_zeros(1), empty, like.new_zeros(0), d_sae, shape)
    starts = [0, *torch.tensor([part.ids.numel() for part in parts]).cumsum(0).tolist()]
    offsets = [parts[0].offsets[:1]] + [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    ids, values = torch.cat([part.ids for part in parts]), torch.cat([part.values for part in parts])
    return SparseLatents(torch.cat(offsets), ids, values, d_sae, shape)
