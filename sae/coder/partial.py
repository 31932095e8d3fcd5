"""Some latents of a coder, without the others: what is not asked for is not read, which tells with a mapped file.

    each latent by itself    h = y W_enc[ids]^T + b_enc[ids], and the rule on these alone
    the k best of a group    W_enc goes by in chunks of rows, every token keeps the k best so far: of equal ones, as in
                             the whole, the first. In the end those are left that were asked for. One group is all
                             latents, or of the groups of neighbors those of the latents that were asked for
    anything else            the full codes: matching pursuit, choice by gradients, rules that do not say how to

Neither [n, d_sae] pre-activations nor W_enc are ever whole in memory. Products are taken in float32 at least, from
inputs that are not rounded to the coder's precision: a mapped bfloat16 coder gives the values of the one that was
loaded in float32. The last line is the exception: there the coder's own precision holds.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.errors import ConfigError
from sae.coder.tensors import CoderTensors, checked_ids
from sae.kernels.codes import Entries, SparseLatents, flat, offsets_of, rows_of
from sae.selection import Budget

Scores = Callable[[Tensor], tuple[Tensor, Tensor]]
HELD = 2**22  # most entries of W_enc, and of a [tokens, latents] product, at once: 16 MiB in float32


@torch.no_grad()
def encode(
    coder: CoderTensors,
    x: Float[Tensor, "n d_in"],
    latents: Sequence[int] | Int[Tensor, "m"],
    whole: bool,
    full: Callable[[], SparseLatents],
) -> SparseLatents:
    """Returns those entries of a coder's codes that are of some latents; `SparseCoder.encode` with `latents`.

    `full` computes all codes; with `whole`, nothing else will do, whatever the rule. ConfigError names an id that is
    out of range or given twice.
    """
    spec, best = coder.spec, coder.spec.rule.best_of(coder.rule_groups()[0].stop)
    ids = checked_ids(latents, spec.d_sae, x.device).sort().values
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise ConfigError(f"latents: {int(twice[0])} is given twice; each may be asked for once")
    if not whole and spec.rule.competes(bool(spec.calibration)) == "nothing":
        parts = _alone(coder, x, ids)
    elif not whole and best:
        parts = _best(coder, x, ids, *best)
    else:
        codes = full()
        parts = iter([Entries(codes.tokens, codes.ids, codes.values).take(torch.isin(codes.ids, ids))])
    found = Entries.cat([Entries(ids[:0], ids[:0], x[:0, 0]), *parts])
    found = found.take(torch.argsort(found.tokens * spec.d_sae + found.ids))
    offsets = offsets_of(torch.bincount(found.tokens, minlength=len(x)))
    return SparseLatents(offsets, found.ids, found.values, spec.d_sae, (len(x),))


def _read(coder: CoderTensors, number: int, some: Int[Tensor, "m"] | slice, dtype: torch.dtype) -> Scores:
    """Reads the encoders of some latents of block `number`, counted from its first.

    Returns what makes of inputs their pre-activations, and what selection compares.
    """
    spec, (own, *_) = coder.spec, coder.blocks[number]
    tensors = {name: tensor[own][some].to(dtype) for name, tensor in coder.encoder_tensors().items()}
    norms = coder.decoders(frozen=True)[number][some].to(dtype).norm(dim=1) if spec.select_by_decoder_norm else None

    def scores(y: Float[Tensor, "n width"]) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
        h = spec.encoding.preactivations(y, tensors)
        return h, h if norms is None else h * norms

    return scores


def _alone(coder: CoderTensors, x: Float[Tensor, "n d_in"], ids: Int[Tensor, "m"]) -> Iterator[Entries]:
    """Yields the entries of latents that fire by themselves."""
    spec = coder.spec
    for number, (block, y) in enumerate(zip(coder.blocks, _inputs(coder, x), strict=True)):
        mine = ids[(ids >= block.latents.start) & (ids < block.latents.stop)]
        for some in mine.split(max(1, HELD // y.shape[1])) if len(mine) else ():
            scores = _read(coder, number, some - block.latents.start, x.dtype)
            given = coder.given(0 if spec.budget == "shared" else number, some)
            own = {name: tensor.to(x.dtype) for name, tensor in given.items()}
            for start, part in _split(y, max(1, HELD // len(some))):
                h, compared = scores(part)
                offsets, local = spec.rule.infer(compared, own)
                kept = h.reshape(-1).index_select(0, flat(offsets, local, len(some)))
                values = spec.selection.activate(kept, local, own)
                yield Entries(rows_of(offsets) + start, some[local], values)


def _best(
    coder: CoderTensors, x: Float[Tensor, "n d_in"], ids: Int[Tensor, "m"], size: int, rule: Budget
) -> Iterator[Entries]:
    """Yields the entries of latents that win over the others of their group of `size` neighbors."""
    inputs = _inputs(coder, x)
    for first in (torch.unique(ids // size) * size).tolist():
        chosen, h = _walk(coder, inputs, rule, slice(first, first + size))
        wanted = torch.isin(chosen, ids)
        tokens, own = wanted.nonzero()[:, 0], chosen[wanted]
        yield Entries(tokens, own, coder.spec.selection.activate(h[wanted], own, coder.per_latent()))


def _walk(
    coder: CoderTensors, inputs: tuple[Tensor, ...], rule: Budget, group: slice
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Returns the ids, ascending, that a rule for the k best keeps of a group, and their pre-activations."""
    h = compared = inputs[0].new_zeros(len(inputs[0]), 0)
    chosen, k, size = h.long(), rule.k, coder.spec.d_sae // coder.spec.n_blocks
    for number, (block, y) in enumerate(zip(coder.blocks, inputs, strict=True)):
        first, last = (min(max(end - block.latents.start, 0), size) for end in (group.start, group.stop))
        step = max(1, HELD // y.shape[1])
        for begin in range(first, last, step):
            end, parts = min(begin + step, last), []
            scores = _read(coder, number, slice(begin, end), y.dtype)
            ids = torch.arange(begin, end, device=y.device) + block.latents.start
            for start, part in _split(y, max(1, HELD // (k + len(ids)))):
                here = slice(start, start + len(part))
                own, key = scores(part)
                both = [torch.cat(pair, dim=1) for pair in ((h[here], own), (compared[here], key))]
                all_ids = torch.cat([chosen[here], ids.expand(len(part), -1)], dim=1)
                if all_ids.shape[1] > k:
                    best = rule.infer(both[1], {})[1].view(len(part), k)
                    all_ids, *both = (t.gather(1, best) for t in (all_ids, *both))
                parts.append((all_ids, *both))
            chosen, h, compared = (torch.cat(members) for members in zip(*parts, strict=True))
    return chosen, h


def _inputs(coder: CoderTensors, x: Float[Tensor, "n d_in"]) -> tuple[Tensor, ...]:
    """Returns what every block of latents sees of the inputs."""
    return coder.centered(x)[0].chunk(coder.spec.n_blocks, dim=1)


def _split(y: Float[Tensor, "n width"], size: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, y[start : start + size]) for start in range(0, max(1, len(y)), size))
