"""The language model with a coder in place, for losses that look at what it predicts."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.lm.hooks import model_inputs
from sae.lm.intervene import replace_at
from sae.lm.masking import next_token_mask
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.objectives import Spliced
from sae.stream.batch import TextBatch
from sae.text.packing import token_ids


def splicer(
    lm: LanguageModel, text: TextBatch, usual: Bool[Tensor, "n"], writes: tuple[Site, ...], rows_per_pass: int
) -> tuple[tuple[int, ...], Callable[[int, Float[Tensor, "m d_out"]], Spliced]]:
    """Returns the tokens of each micro-batch of rows, and a function that runs the model on one of them.

    The function puts raw outputs [m, d_out] of the coder in place at the sites written, at the tokens that are left by
    `usual`, and returns clean and patched logits of the counted tokens; the patched ones are differentiable in the
    outputs. All sites are replaced by what the coder made of the model's own activations.
    """
    keep = text.keep.clone()
    keep[text.keep] = usual.cpu()
    chunks = list(zip(text.tokens.split(rows_per_pass), keep.split(rows_per_pass), strict=True))

    def run(number: int, outputs: Float[Tensor, "m d_out"]) -> Spliced:
        tokens, kept = (part.to(lm.device) for part in chunks[number])
        outputs = outputs.to(lm.device)
        chosen = next_token_mask(tokens, kept)

        def logits() -> Tensor:
            found = lm.model(**model_inputs(lm, tokens)).logits[:, :-1][chosen]
            return found.to(torch.promote_types(found.dtype, torch.float32))

        with torch.no_grad():
            clean = logits()
        with ExitStack() as stack, torch.enable_grad():
            start = 0
            for site in writes:
                columns = outputs[:, start : start + site.width]
                stack.enter_context(replace_at(lm.model, site, _at(columns, kept), kept))
                start += site.width
            return Spliced(clean, logits(), token_ids(tokens)[:, 1:][chosen].long())

    return tuple(int(part.sum()) for _, part in chunks), run


def _at(rows: Float[Tensor, "m d"], keep: Bool[Tensor, "rows context"]) -> Callable[[Tensor], Tensor]:
    """Returns what puts rows at the kept positions of a tensor."""

    def put(x: Tensor) -> Tensor:
        kept = keep[..., None].to(x.device).expand_as(x)
        return torch.zeros_like(x, dtype=rows.dtype).masked_scatter(kept, rows.to(x.device))

    return put
