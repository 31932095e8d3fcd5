"""The language model with a coder in place, for losses that look at what it predicts."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.lm.hooks import model_inputs
from sae.lm.intervene import replace_at
from sae.lm.masking import next_token_mask
from sae.lm.models import LanguageModel
from sae.lm.replay import Made, Stretch, recorded, replayed
from sae.lm.site import Site
from sae.objectives import Spliced
from sae.stream.batch import TextBatch
from sae.text.packing import token_ids

KEPT_LOGITS = 2**25  # of several micro-batches, kept for the other coders: 128 MiB in float32


class Clean(NamedTuple):
    """What the model as it is makes of some rows."""

    logits: Float[Tensor, "counted vocabulary"]
    """Of the tokens that count and have a next one, without gradient."""
    made: dict[Stretch, Made]
    """What modules have made below the sites that each coder writes."""


class CleanPasses:
    """The model as it is on the micro-batches of some rows: of each one pass, for all coders that write something."""

    def __init__(self, lm: LanguageModel, text: TextBatch, rows_per_pass: int, writes: list[tuple[Site, ...]]) -> None:
        self.lm, self.begun, self.stretches = lm, text.made, {Stretch(sites) for sites in writes}
        self.chunks = list(zip(text.tokens.split(rows_per_pass), text.keep.split(rows_per_pass), strict=True))
        self.room = KEPT_LOGITS if len(writes) > 1 else 0
        self.kept: dict[int, Clean] = {}

    def counted(self, number: int) -> Bool[Tensor, "rows context_1"]:
        """Returns of which tokens of a micro-batch there are logits."""
        return next_token_mask(*self.chunks[number])

    @torch.no_grad()
    def at(self, number: int) -> Clean:
        """Returns the pass of a micro-batch, kept where there are no others or there is room."""
        if number in self.kept:
            return self.kept[number]
        logits, made = self._run(self.chunks[number][0])
        clean = Clean(as_counted(logits, self.counted(number)), made)
        if len(self.chunks) == 1 or clean.logits.numel() <= self.room:
            self.room -= clean.logits.numel()
            self.kept[number] = clean
        return clean

    def _run(self, tokens: Int[Tensor, "rows context"]) -> tuple[Tensor, dict[Stretch, Made]]:
        """Returns all logits of a pass, which goes on from where activations were read if that was of the same rows."""
        model, begun = self.lm.model, self.begun
        far = next((stretch for stretch in begun if stretch.to_last), None)
        if far and len(self.chunks) == 1 and self.stretches <= begun.keys():
            with replayed(model, begun[far]):
                return model(**model_inputs(self.lm, tokens)).logits, begun
        with recorded(model, self.stretches) as made:
            return model(**model_inputs(self.lm, tokens)).logits, made


def as_counted(
    logits: Float[Tensor, "rows context vocabulary"], counted: Bool[Tensor, "rows context_1"]
) -> Float[Tensor, "counted vocabulary"]:
    """Returns the logits of some tokens, at least in float32."""
    found = logits[:, :-1][counted.to(logits.device)]
    return found.to(torch.promote_types(found.dtype, torch.float32))


def splicer(
    passes: CleanPasses, usual: Bool[Tensor, "n"], writes: tuple[Site, ...]
) -> tuple[tuple[int, ...], Callable[[int, Float[Tensor, "m d_out"]], Spliced]]:
    """Returns the tokens of each micro-batch of rows, and a function that runs the model on one of them.

    The function puts raw outputs [m, d_out] of the coder in place at the sites written, at the tokens that are left by
    `usual`, and returns clean and patched logits of the counted tokens; the patched ones are differentiable in the
    outputs. All sites are replaced by what the coder made of the model's own activations.
    """
    lm, left = passes.lm, usual.cpu().split([int(keep.sum()) for _, keep in passes.chunks])
    kept = [keep.masked_scatter(keep, own) for (_, keep), own in zip(passes.chunks, left, strict=True)]

    def run(number: int, outputs: Float[Tensor, "m d_out"]) -> Spliced:
        tokens, keep, every = passes.chunks[number][0], kept[number].to(lm.device), passes.counted(number)
        chosen, outputs, clean = next_token_mask(tokens, kept[number]), outputs.to(lm.device), passes.at(number)
        logits = clean.logits if torch.equal(chosen, every) else clean.logits[chosen[every].to(lm.device)]
        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(replayed(lm.model, clean.made.get(Stretch(writes), {})))
            start = 0
            for site in writes:
                columns = outputs[:, start : start + site.width]
                stack.enter_context(replace_at(lm.model, site, _at(columns, keep), keep))
                start += site.width
            patched = as_counted(lm.model(**model_inputs(lm, tokens)).logits, chosen)
        return Spliced(logits, patched, token_ids(tokens)[:, 1:][chosen].long().to(lm.device))

    return tuple(int(keep.sum()) for keep in kept), run


def _at(rows: Float[Tensor, "m d"], keep: Bool[Tensor, "rows context"]) -> Callable[[Tensor], Tensor]:
    """Returns what puts rows at the kept positions of a tensor."""

    def put(x: Tensor) -> Tensor:
        kept = keep[..., None].to(x.device).expand_as(x)
        return torch.zeros_like(x, dtype=rows.dtype).masked_scatter(kept, rows.to(x.device))

    return put
