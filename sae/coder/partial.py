"""Some latents of a coder, without the others: what is not asked for is not read, which tells with a mapped file.

    each latent by itself    h = y W_enc[ids]^T + b_enc[ids], and the rule on these alone
    the k best of a token    W_enc goes by in chunks of rows, every token keeps the k best so far: of equal ones, as in
                             the whole, the first. In the end those are left that were asked for
    the best of a group      the same with k = 1, in the groups of the latents that were asked for
    anything else            the full codes: matching pursuit, choice by gradients, rules that are not known here

Neither [n, d_sae] pre-activations nor W_enc are ever whole in memory. Products are taken in float32 at least, from
inputs that are not rounded to the coder's precision: a mapped bfloat16 coder gives the values of the one that was
loaded in float32. The last line is the exception: there the coder's own precision holds.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.spec import CoderSpec
from sae.kernels.codes import Entries, SparseLatents, flat, offsets_of, rows_of
from sae.selection import Selection
from sae.selection.feature_choice import FeatureChoice
from sae.selection.gated import Gated
from sae.selection.gradient_topk import GradientTopK
from sae.selection.groupmax import GroupMax
from sae.selection.jumprelu import JumpReLU
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK
from sae.selection.unrectified_topk import UnrectifiedTopK

if TYPE_CHECKING:
    from sae.coder.coder import SparseCoder

HELD = 2**22  # most entries of W_enc, and of a [tokens, latents] product, at once: 16 MiB in float32
ALONE: tuple[type[Selection], ...] = (ReLU, Gated, JumpReLU, FeatureChoice)
BEST: tuple[type[Selection], ...] = (TopK, UnrectifiedTopK, SignedTopK, GradientTopK, MutualChoice)


def decides_alone(spec: CoderSpec) -> bool:
    """Returns whether a latent fires or not at inference whatever the others do."""
    rule = type(spec.selection)
    return rule in ALONE or (rule is MutualChoice and bool(spec.calibration))


def checked(latents: Sequence[int] | Int[Tensor, "m"], d_sae: int, device: torch.device) -> Int[Tensor, "m"]:
    """Returns latent ids as a tensor; ConfigError names one that there is not."""
    ids = torch.as_tensor(latents, device=device)
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise ConfigError(f"latents: {ids.dtype} are no latent ids; allowed are whole numbers from 0 to {d_sae - 1}")
    ids = ids.long().reshape(-1)
    outside = ids[(ids < 0) | (ids >= d_sae)]
    if len(outside):
        raise ConfigError(f"latents: {int(outside[0])} is not a latent; allowed are 0 to {d_sae - 1}")
    return ids


@torch.no_grad()
def encode(
    coder: "SparseCoder",
    x: Float[Tensor, "n d_in"],
    latents: Sequence[int] | Int[Tensor, "m"],
    gradients: Float[Tensor, "*shape d_out"] | None = None,
) -> SparseLatents:
    """Returns those entries of a coder's codes that are of some latents; `SparseCoder.encode` with `latents`.

    ConfigError names an id that is out of range or given twice.
    """
    spec = coder.spec
    ids = checked(latents, spec.d_sae, x.device).sort().values
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise ConfigError(f"latents: {int(twice[0])} is given twice; each may be asked for once")
    plain = gradients is None and getattr(spec.selection, "inference", "plain") == "plain"
    if plain and decides_alone(spec):
        parts = _alone(coder, x, ids)
    elif plain and type(spec.selection) in (*BEST, GroupMax):
        parts = _best(coder, x, ids)
    else:
        full = coder.encode(x, None if gradients is None else gradients.reshape(-1, spec.d_out))
        parts = iter([Entries(full.tokens, full.ids, full.values).take(torch.isin(full.ids, ids))])
    found = Entries.cat([Entries(ids[:0], ids[:0], x[:0, 0]), *parts])
    found = found.take(torch.argsort(found.tokens * spec.d_sae + found.ids))
    offsets = offsets_of(torch.bincount(found.tokens, minlength=len(x)))
    return SparseLatents(offsets, found.ids, found.values, spec.d_sae, (len(x),))


@torch.no_grad()
def encoder_rows(coder: "SparseCoder", latents: Sequence[int] | Int[Tensor, "m"]) -> Float[Tensor, "m d_in"]:
    """Returns the encoder rows of some latents, in float32; zero in columns that a latent does not read."""
    ids, layers = checked(latents, coder.spec.d_sae, coder.W_enc.device), coder.spec.n_blocks
    out = torch.zeros(len(ids), layers, coder.W_enc.shape[1], device=ids.device)
    out[torch.arange(len(ids), device=ids.device), ids // (coder.spec.d_sae // layers)] = coder.W_enc[ids].float()
    return out.flatten(1)


@torch.no_grad()
def decoder_rows(coder: "SparseCoder", latents: Sequence[int] | Int[Tensor, "m"]) -> Float[Tensor, "m d_out"]:
    """Returns the decoder rows of some latents, in float32; zero in columns that a latent does not write."""
    ids = checked(latents, coder.spec.d_sae, coder.W_dec.device)
    out = torch.zeros(len(ids), coder.spec.d_out, device=ids.device)
    for block, weight in zip(coder.blocks, coder.decoders(frozen=True), strict=True):
        mine = (ids >= block.latents.start) & (ids < block.latents.stop)
        out[mine, block.columns] = weight[ids[mine] - block.latents.start].float()
    return out


class Rows(NamedTuple):
    """The encoders of some latents of one block, in memory."""

    weight: Float[Tensor, "m width"]
    bias: Float[Tensor, "m"]
    gate: tuple[Tensor, Tensor] | None
    """Weight and bias of encoder "glu"'s gate."""
    norms: Float[Tensor, "m"] | None
    """Of the decoders, where selection compares with them."""

    def scores(self, y: Float[Tensor, "n width"]) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
        """Returns pre-activations, and what selection compares."""
        h = torch.nn.functional.linear(y, self.weight, self.bias)
        if self.gate is not None:
            h = h * torch.nn.functional.linear(y, *self.gate).sigmoid()
        return h, h if self.norms is None else h * self.norms


def _read(coder: "SparseCoder", number: int, some: Int[Tensor, "m"] | slice, dtype: torch.dtype) -> Rows:
    """Returns the encoders of some latents of block `number`, counted from its first."""
    spec, (own, *_) = coder.spec, coder.blocks[number]
    names = ("W_enc", "b_enc", "W_glu", "b_glu") if spec.encoder == "glu" else ("W_enc", "b_enc")
    weight, bias, *gate = (getattr(coder, name)[own][some].to(dtype) for name in names)
    norms = None
    if spec.select_by_decoder_norm:
        norms = coder.decoders(frozen=True)[number][some].to(dtype).norm(dim=1)
    return Rows(weight, bias, (gate[0], gate[1]) if gate else None, norms)


def _alone(coder: "SparseCoder", x: Float[Tensor, "n d_in"], ids: Int[Tensor, "m"]) -> Iterator[Entries]:
    """Yields the entries of latents that fire by themselves."""
    spec = coder.spec
    for number, (block, y) in enumerate(zip(coder.blocks, _inputs(coder, x), strict=True)):
        mine = ids[(ids >= block.latents.start) & (ids < block.latents.stop)]
        for some in mine.split(max(1, HELD // y.shape[1])) if len(mine) else ():
            rows = _read(coder, number, some - block.latents.start, x.dtype)
            own = {name: tensor[some].to(x.dtype) for name, tensor in coder.per_latent().items()}
            if spec.calibration:
                cut = spec.calibration[0 if spec.budget == "shared" else number]
                own["calibration"] = torch.tensor(cut, dtype=torch.float32)
            for start, part in _split(y, max(1, HELD // len(some))):
                h, compared = rows.scores(part)
                offsets, local = spec.rule.infer(compared, own)
                kept = h.reshape(-1).index_select(0, flat(offsets, local, len(some)))
                values = spec.selection.activate(kept, local, own)
                yield Entries(rows_of(offsets) + start, some[local], values)


def _best(coder: "SparseCoder", x: Float[Tensor, "n d_in"], ids: Int[Tensor, "m"]) -> Iterator[Entries]:
    """Yields the entries of latents that win over others: of a token, of a block, or of their group."""
    spec, rule, groups, inputs = coder.spec, coder.spec.rule, coder.rule_groups(), _inputs(coder, x)
    if isinstance(rule, GroupMax):
        size = spec.d_sae // rule.k // (1 if spec.budget == "shared" else spec.n_blocks)
        groups = [slice(first, first + size) for first in (torch.unique(ids // size) * size).tolist()]
        rule = TopK(1)
    for group in groups:
        asked = ids[(ids >= group.start) & (ids < group.stop)]
        if len(asked):
            chosen, h = _walk(coder, inputs, rule, group)
            wanted = torch.isin(chosen, asked)
            tokens, own = wanted.nonzero()[:, 0], chosen[wanted]
            yield Entries(tokens, own, spec.selection.activate(h[wanted], own, coder.per_latent()))


def _walk(
    coder: "SparseCoder", inputs: tuple[Tensor, ...], rule: Selection, group: slice
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Returns the ids, ascending, that a rule for the k best keeps of a group, and their pre-activations."""
    k: int = rule.k  # type: ignore[attr-defined]
    h = compared = inputs[0].new_zeros(len(inputs[0]), 0)
    chosen, size = h.long(), coder.spec.d_sae // coder.spec.n_blocks
    for number, (block, y) in enumerate(zip(coder.blocks, inputs, strict=True)):
        first, last = (min(max(end - block.latents.start, 0), size) for end in (group.start, group.stop))
        step = max(1, HELD // y.shape[1])
        for begin in range(first, last, step):
            end, parts = min(begin + step, last), []
            rows = _read(coder, number, slice(begin, end), y.dtype)
            ids = torch.arange(begin, end, device=y.device) + block.latents.start
            for start, part in _split(y, max(1, HELD // (k + len(ids)))):
                here = slice(start, start + len(part))
                own, key = rows.scores(part)
                both = [torch.cat(pair, dim=1) for pair in ((h[here], own), (compared[here], key))]
                all_ids = torch.cat([chosen[here], ids.expand(len(part), -1)], dim=1)
                if all_ids.shape[1] > k:
                    best = rule.infer(both[1], {})[1].view(len(part), k)
                    all_ids, *both = (t.gather(1, best) for t in (all_ids, *both))
                parts.append((all_ids, *both))
            chosen, h, compared = (torch.cat(members) for members in zip(*parts, strict=True))
    return chosen, h


def _inputs(coder: "SparseCoder", x: Float[Tensor, "n d_in"]) -> tuple[Tensor, ...]:
    """Returns what every block of latents sees of the inputs."""
    return coder.centered(x)[0].chunk(coder.spec.n_blocks, dim=1)


def _split(y: Float[Tensor, "n width"], size: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, y[start : start + size]) for start in range(0, max(1, len(y)), size))
