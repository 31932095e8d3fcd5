"""What a latent does rather than when: the tokens that its direction promotes, and the latents that point the same way.

    logits of a latent = W_U (g * M d)

d is what a unit of the latent adds to the residual stream (`paths.py`), g the gain of the final norm, M subtracts the
mean where that norm does (LayerNorm), and W_U the unembedding: the direct path to the logits with the scale of the norm
taken as constant ("VocabProj", Gur-Arieh 2025, arXiv 2501.08319).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.evidence.paths import NoPath, final_norm, through_norm, ways_of
from sae.coder.coder import CHUNK_ENTRIES, SparseCoder
from sae.coder.splicing import directions
from sae.lm.models import LanguageModel
from sae.lm.placement import present

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LATENTS = 4096  # looked at together
PIECE = CHUNK_ENTRIES // LATENTS  # of the vocabulary

Tokens = tuple[tuple[str, ...], tuple[str, ...]]


def promoted_tokens(lm: LanguageModel, coder: SparseCoder, latents: Sequence[int], count: int = 10) -> list[Tokens]:
    """Returns for each latent the `count` tokens whose logits it raises most, and those that it lowers most.

    Both are empty where its direction does not reach the residual stream linearly, where the parts of the model are
    not known, or where the latent writes nothing. How much a norm scales what passes it is known of no token, so they
    are empty too where one follows and something else is added to what passes it.
    """
    through = readout(lm, coder)
    if through is None:
        return [((), ())] * len(latents)
    found: list[Tokens] = []
    for chosen in torch.tensor(list(latents), dtype=torch.long).split(LATENTS):
        read = through.read(directions(coder, chosen))
        words = [
            [tuple(token_text(lm.tokenizer, token) for token in row) for row in side.ids.tolist()]
            for side in extremes(read, through.weight, count)
        ]
        writes = (read.norm(dim=1) > 0).tolist()
        found += [(up, down) if some else ((), ()) for up, down, some in zip(*words, writes, strict=True)]
    return found


class Readout(NamedTuple):
    """How the logits read what a coder writes."""

    weight: Float[Tensor, "vocabulary d_model"]
    """Of the unembedding, the rows of tokens that there are."""
    read: Callable[[Tensor], Tensor]
    """Takes directions at the sites that are written to what the unembedding is multiplied with."""


def readout(lm: LanguageModel, coder: SparseCoder) -> Readout | None:
    """Returns how the logits read what a coder writes; None where `promoted_tokens` tells nothing."""
    unembedding = lm.model.get_output_embeddings()
    try:
        norm, into = lm.model.get_submodule(final_norm(lm.model)), ways_of(lm.model, coder)
    except NoPath:
        return None
    if unembedding is None or (into.norms and len(into.parts) > 1):
        return None
    with present(unembedding):  # type: ignore[arg-type]
        weight: Tensor = unembedding.weight[: len(lm.tokenizer)]  # type: ignore[index]
    return Readout(weight, lambda x: through_norm(norm, into(x.to(lm.device))).to(weight.device))


def decoder_neighbors(coder: SparseCoder, latents: Sequence[int], count: int = 10) -> list[list[tuple[int, float]]]:
    """Returns for each latent the `count` others whose decoders point most nearly its way, as (latent, cosine)."""
    norms = coder.decoder_norms().detach().float().clamp_min(1e-30)
    found: list[list[tuple[int, float]]] = []
    for some in torch.tensor(list(latents), dtype=torch.long).split(max(1, CHUNK_ENTRIES // coder.spec.d_sae)):
        chosen = some.to(norms.device)
        rows = coder.decoder_rows(chosen)
        cosines = coder.onto_decoders(rows) / norms / norms[chosen, None]
        cosines[torch.arange(len(chosen), device=norms.device), chosen] = -torch.inf  # itself
        best = cosines.topk(min(count, coder.spec.d_sae - 1), dim=1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found += [list(zip(ids, values, strict=True)) for ids, values in pairs]
    return found


def token_text(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """Returns a token as text, with the space before it that some tokenizers drop when they decode one alone."""
    name, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
    has_space = isinstance(name, str) and name.startswith("\u2581")
    return f" {text}" if has_space and not str(text).startswith(" ") else str(text)


class Extremes(NamedTuple):
    """The tokens whose logits are changed most one way."""

    values: Float[Tensor, "m count"]
    ids: Int[Tensor, "m count"]


def extremes(
    x: Float[Tensor, "m d"], unembedding: Float[Tensor, "vocabulary d"], count: int
) -> tuple[Extremes, Extremes]:
    """Returns the largest logits of vectors, the largest first, and the smallest, the smallest first.

    It looks at a piece of the vocabulary at a time.
    """
    x = x.to(unembedding.device)
    none = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
    best = [Extremes(x.new_zeros(len(x), 0), none), Extremes(x.new_zeros(len(x), 0), none)]
    for start in range(0, len(unembedding), PIECE):
        logits = x @ unembedding[start : start + PIECE].float().T
        for side, signed in enumerate((logits, -logits)):
            new = signed.topk(min(count, signed.shape[1]), dim=1)
            values = torch.cat([best[side].values, new.values], 1)
            kept = values.topk(min(count, values.shape[1]), dim=1)
            ids = torch.cat([best[side].ids, new.indices + start], 1)
            best[side] = Extremes(kept.values, ids.gather(1, kept.indices))
    up, down = best
    return up, Extremes(-down.values, down.ids)
