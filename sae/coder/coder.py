"""SparseCoder: encode, decode, forward. The map itself is written at the head of `sae/coder/spec.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae import kernels
from sae.coder import partial, tiles
from sae.coder.folds import Folding
from sae.coder.normalization import Undo, undo
from sae.coder.published import Published
from sae.coder.shard import summed
from sae.coder.wording import description, kind, known_figures, summary
from sae.kernels.codes import PAD, Entries, SparseLatents, Support, counted, flat, offsets_of, rows_of
from sae.lm.site import column_weights
from sae.pages.notebook import table
from sae.selection import Moment

CHUNK_ENTRIES = 2**24  # of [tokens, d_sae] that are held at once outside training: 64 MiB in float32


class CoderOutput(NamedTuple):
    """What a coder makes of activations."""

    out: Float[Tensor, "*shape d_out"]
    """The reconstruction (or prediction), the skip path included."""
    latents: SparseLatents


class Look(NamedTuple):
    """n tokens as the encoder sees them."""

    x: Float[Tensor, "n d_in"]
    y: Float[Tensor, "n d_in"]
    """N(x) - p, the encoder's input."""
    how: Undo
    """What undoes the normalization of an output."""


class Choice(NamedTuple):
    """Entries of some tokens that were chosen, as compressed rows, with their pre-activations."""

    offsets: Int[Tensor, "n_plus_1"]
    ids: Int[Tensor, "nnz"]
    """Ascending in a row. Entries that only fill a buffer stand at the end of a row, with pre-activation PAD."""
    known: Float[Tensor, "nnz"] | None = None
    """Pre-activations at the support; None where they are to be computed."""
    exact: bool = True
    """Whether these have the precision of the weights; else they are computed again."""


@dataclass(frozen=True)
class Pass:
    """One differentiable pass over n tokens in the normalized space, with what the objectives need of it."""

    y: Float[Tensor, "n d_in"]
    """N(x) - p, the encoder's input."""
    kept: Float[Tensor, "nnz"]
    """The pre-activations at the support."""
    latents: SparseLatents
    rest: Float[Tensor, "n d_out"]
    """What the latents do not make of the prediction: the bias and the skip path."""
    prediction: Float[Tensor, "n d_out"]
    """The output before N^-1."""
    square: Float[Tensor, ""]
    """Sum of squares of the weighted error, differentiable."""
    error: Float[Tensor, "n d_out"]
    """Target less prediction, without gradient."""
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
        weights = [("weights", f"{str(self.dtype).removeprefix('torch.')}, {self.whereabouts}")]
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
            rows = self._rows(x, torch.promote_types(self.like.dtype, torch.float32))
            beside = None if gradients is None else gradients.reshape(-1, self.spec.d_out)
            whole = gradients is not None or self.spec.rule.looks_at_gradients or self.spec.encoding.pursues
            found = partial.encode(self, rows, latents, whole, lambda: self.encode(rows, beside))
            return replace(found, leading=tuple(x.shape[:-1]))
        with torch.no_grad():
            rows, size = self._rows(x), max(1, CHUNK_ENTRIES // self.spec.d_sae)
            size = tiles.tokens(self) if self._by_tiles(len(rows), gradients is not None) else size
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

    def look(self, x: Float[Tensor, "n d_in"]) -> Look:
        """Returns rows x as the encoder sees them, differentiable in what stands before it."""
        x = x.to(self.like)
        return Look(x, *self.centered(x))

    def scores(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """Returns all pre-activations of rows x, without gradient; n * d_sae values, so for small n only."""
        return self.preactivations(self.look(x).y)

    def run(self, look: Look, choice: Choice, target: Float[Tensor, "n d_out"]) -> Pass:
        """Returns one pass with what was chosen, against a target, differentiable in the parameters at the support."""
        kept, latents = self.coded(look, choice)
        rest, n = self.b_dec, len(look.x)
        if self.spec.skip:
            rest = rest + self.skipped(look.x) / look.how[1]  # N^-1 gives it back its size
        if self.shard and self.shard.axis.rank:  # what all shards have takes its gradient from one of them
            rest = rest.detach()
        made, square, error = self.fit(latents, rest, target)
        return Pass(look.y, kept, latents, rest.expand(n, -1), made, square, error, look.how)

    def coded(self, look: Look, choice: Choice) -> tuple[Float[Tensor, "nnz"], SparseLatents]:
        """Returns the pre-activations and the codes at what was chosen, differentiable."""
        kept = self.preactivations_at(look.y, choice)
        values = self.spec.selection.activate(kept, choice.ids, self.per_latent())
        return kept, SparseLatents(choice.offsets, choice.ids, values, self.spec.d_sae, (len(look.x),))

    def fit(
        self,
        latents: SparseLatents,
        rest: Float[Tensor, "*n d_out"],
        target: Float[Tensor, "n d_out"],
        frozen: bool = False,
    ) -> tuple[Float[Tensor, "n d_out"], Float[Tensor, ""], Float[Tensor, "n d_out"]]:
        """Returns (rest + codes times decoder, the sum of squares of the weighted error, target less the first).

        The first two are differentiable, in the codes and the rest alone where `frozen`; the error is not.
        """
        if self.spec.n_blocks == 1 and not self.shard and all(site.weight == 1 for site in self.spec.writes):
            weight, into = (self.W_dec.detach(), None) if frozen else (self.W_dec, self._into(0))
            return kernels.fit(latents.values, weight, rest, target, latents.offsets, latents.ids, into)
        made = self.decoded(latents.values, latents.offsets, latents.ids, frozen) + rest
        error = target - made
        return made, self.weighted(error).square().sum(), error.detach()

    def weighted(self, error: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """Returns errors with each written site's columns times the root of the site's weight."""
        sites = self.spec.writes
        if all(site.weight == 1 for site in sites):
            return error
        return error * column_weights(sites).sqrt().to(error)

    @torch.no_grad()
    def preactivations(
        self,
        y: Float[Tensor, "n d_in"],
        tensors: dict[str, Tensor] | None = None,
        out: Float[Tensor, "n d_sae"] | None = None,
    ) -> Float[Tensor, "n d_sae"]:
        """Returns what the encoder makes of its input, without gradient.

        `tensors` are those of the encoder in another precision, which the result then has. Where it can be, it is
        written into `out`.
        """
        tensors = tensors or self.encoder_tensors()
        return self.spec.encoding.preactivations(y.to(tensors["W_enc"].dtype), tensors, self.spec.n_blocks, out)

    def preactivations_at(self, y: Float[Tensor, "n d_in"], choice: Choice) -> Float[Tensor, "nnz"]:
        """Returns pre-activations at what was chosen, differentiable."""
        offsets, ids, known, exact = choice
        layers, n = self.spec.n_blocks, len(y)
        if layers > 1:  # a row for each (token, layer): ids ascend, so the order of the entries stays
            size = self.spec.d_sae // layers
            rows = rows_of(offsets, len(ids)) * layers + torch.div(ids, size, rounding_mode="floor")
            y, offsets = y.reshape(n * layers, -1), offsets_of(counted(rows, n * layers))
        given = known if exact else None
        kept = self.spec.encoding.preactivations_at(y, self.encoder_tensors(), offsets, ids, given, self.sink)
        if known is None or (exact and self.spec.encoding.affine):
            return kept
        return torch.where(known == PAD, known, kept)

    def decoded(
        self,
        values: Float[Tensor, "nnz"],
        offsets: Int[Tensor, "n_plus_1"],
        ids: Int[Tensor, "nnz"],
        frozen: bool = False,
    ) -> Float[Tensor, "n d_out"]:
        """Returns codes times decoder, without bias, differentiable in both; in the codes alone where `frozen`.

        Of a shard, what those of all ranks make together; all must ask.
        """
        own = self._own_decoded(values, offsets, ids, frozen)
        return summed(own, self.shard.axis) if self.shard else own

    def _own_decoded(self, values: Tensor, offsets: Tensor, ids: Tensor, frozen: bool) -> Float[Tensor, "n d_out"]:
        if self.spec.n_blocks == 1:
            weight = self.W_dec.detach() if frozen else self.W_dec
            return kernels.decode(values, weight, offsets, ids, self._into(0))
        tokens, n = rows_of(offsets, len(ids)), offsets.numel() - 1
        out = self.W_dec.new_zeros(n, self.spec.d_out)
        # What fills a buffer up repeats the last latent with 0: with it, a block could seem to have all entries.
        first = torch.ones_like(ids, dtype=torch.bool)
        first[1:] = (ids[1:] != ids[:-1]) | (tokens[1:] != tokens[:-1])
        for number, (block, weight) in enumerate(zip(self.blocks, self.decoders(frozen), strict=True)):
            mine = (ids >= block.latents.start) & (ids < block.latents.stop) & first
            counts = torch.bincount(tokens[mine], minlength=n)
            starts = offsets_of(counts)
            part = kernels.decode(values[mine], weight, starts, ids[mine] - block.latents.start, self._into(number))
            out = out + torch.nn.functional.pad(part, (block.columns.start, 0))
        return out

    def _into(self, block: int) -> kernels.Gradient | None:
        """Returns where the gradient of a block's decoder is collected, if it is."""
        return self.sink.of(f"W_dec.{block}") if self.sink else None

    @torch.no_grad()
    def effects(self, gradients: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_sae"]:
        """Returns |<g, W_dec_i>|: to first order, what a unit of each latent changes the loss by."""
        return self.onto_decoders(gradients).abs()

    @torch.no_grad()
    def onto_decoders(self, rows: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_sae"]:
        """Returns <row, W_dec_i> for every latent; n * d_sae values, so for small n only."""
        parts = zip(self.blocks, self.decoders(), strict=True)
        return torch.cat([rows[:, block.columns] @ weight.to(rows).T for block, weight in parts], dim=1)

    @torch.no_grad()
    def compared(
        self,
        scores: Float[Tensor, "n d_sae"],
        how: Undo = (0.0, 1.0),
        gradients: Float[Tensor, "n d_in"] | None = None,
        moments: list[Moment] | None = None,
    ) -> Float[Tensor, "n d_sae"]:
        """Returns what selection compares: pre-activations, times decoder norms or augmented where the spec says so.

        `gradients` are those of the loss at the sites written, in the model's own units, which `how` leads to;
        `moments` what the rule knows of a training step, for every block.
        """
        scores = scores * self.decoder_norms() if self.spec.select_by_decoder_norm else scores
        if gradients is None or self.spec.selection.gradient_loss is None:
            return scores
        effects = self.effects(gradients * how[1])  # the chain rule, with the normalization taken as constant
        groups = self.rule_groups()
        found = self.spec.calibration or (0.0,) * len(groups)
        moments = moments or [Moment(1.0, len(scores), {"calibration": torch.tensor(number)}) for number in found]
        both = zip(groups, moments, strict=True)
        return torch.cat([self.spec.rule.augment(scores[:, g], effects[:, g], moment) for g, moment in both], dim=1)

    def support(self, scores: Float[Tensor, "n d_sae"], ask: Callable[..., Support] | None = None) -> Support:
        """Returns the support of compared scores: by the per-token rule, or by `ask(rule, scores, tensors, group)`.

        A cross-layer coder asks once for every block.
        """
        ask = ask or (lambda rule, scores, tensors, group: rule.infer(scores, tensors))
        groups, rule = self.rule_groups(), self.spec.rule
        found = [ask(rule, scores[:, group], self.given(i, group), i) for i, group in enumerate(groups)]
        if len(found) == 1:
            return found[0]
        parts = [(rows_of(o, len(ids)), ids + group.start) for group, (o, ids) in zip(groups, found, strict=True)]
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
        if self._by_tiles(len(x), gradients is not None):
            with torch.no_grad():
                inputs = look.y.to(self.like.dtype).chunk(self.spec.n_blocks, dim=1)
                chosen = tiles.choose(self, tiles.Seen(inputs, None if gradients is None else gradients * look.how[1]))
            return self.coded(look, Choice(*chosen))[1]
        scores = self.preactivations(look.y)
        return self.coded(look, self.chosen(scores, *self.support(self.compared(scores, look.how, gradients))))[1]

    def _by_tiles(self, n: int, gradients: bool) -> bool:
        """Returns whether latents of n tokens are chosen by tiles: where all scores are of too few tokens at a time."""
        at_once = CHUNK_ENTRIES // self.spec.d_sae
        return at_once < min(n, tiles.FEW) and tiles.can_be(self, gradients)

    def chosen(self, scores: Float[Tensor, "n d_sae"], offsets: Tensor, ids: Tensor, exact: bool = True) -> Choice:
        """Returns a support with its pre-activations, given all of them."""
        known = scores.reshape(-1).index_select(0, flat(offsets, ids, scores.shape[1]))
        return Choice(offsets, ids, known, exact)

    def _rows(self, x: Float[Tensor, "*shape d_in"], dtype: torch.dtype | None = None) -> Float[Tensor, "n d_in"]:
        if x.shape[-1] != self.spec.d_in:
            raise ValueError(f"x: last dimension is {x.shape[-1]}, but this coder has d_in = {self.spec.d_in}")
        return x.reshape(-1, self.spec.d_in).to(self.like.device, dtype or self.like.dtype)


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
    starts = [*accumulate((part.ids.numel() for part in parts), initial=0)]
    offsets = [parts[0].offsets[:1]] + [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    ids, values = torch.cat([part.ids for part in parts]), torch.cat([part.values for part in parts])
    return SparseLatents(torch.cat(offsets), ids, values, d_sae, shape)
