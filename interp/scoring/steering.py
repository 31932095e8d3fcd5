"""What a model writes with a latent amplified, beside what it writes without.

    x_t <- x_t + s d        at the sites that the coder writes, at a prompt's last token and at all that are generated

d is the latent's decoder direction; s is found for each latent such that the mean KL(clean || amplified) of the next
token after the prompts is a given number of nats: amplified equally, latents can be compared (arXiv 2410.13928).
Both arms of a prompt are drawn with the same random numbers, so that they differ by what the latent does.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.evidence.subject import Subject
from sae.base.seeding import generator
from sae.base.sums import in_float64
from sae.coder.splicing import directions
from sae.evaluation.metrics import kl_of
from sae.lm.hooks import capture
from sae.lm.intervene import Matched, add, matched_strength, next_logits
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.text.decode import Decoder
from sae.text.packing import PADDING, added

START = 0.3  # of the activations' own norm: the first guess at what is to be added


class Steered(NamedTuple):
    """What came of amplifying a latent."""

    matched: Matched
    clean: list[str]
    """By prompt: the prompt and what the model writes after it."""
    amplified: list[str]
    """The same with the latent amplified."""


@torch.no_grad()
def steered(
    subject: Subject, latent: int, prompts: Sequence[Sequence[int]], kl: float, new_tokens: int, seed: int = 0
) -> Steered | None:
    """Returns both continuations of every prompt, `new_tokens` tokens at temperature 1, none of them special.

    Prompts are token ids without BOS, which is put before them where the coder was trained with it. None where there
    is nothing to amplify: the latent writes nothing, or not in this model. Where `kl` is not reached, nothing is
    written.
    """
    with subject.lock:
        lm, spec = subject.lm, subject.coder.spec
        direction = directions(subject.coder, torch.tensor([latent]))[0].to(lm.device)
        if not spec.writes or any(site.tag for site in spec.writes) or not direction.norm() > 0:
            return None
        bos, _ = added(lm.tokenizer, spec.bos)
        tokens, lengths = _padded([[*bos, *prompt] for prompt in prompts], new_tokens)
        tokens, lengths = tokens.to(lm.device), lengths.to(lm.device)
        keep = torch.arange(tokens.shape[1], device=lm.device) >= lengths[:, None] - 1
        matched = _matched(lm, spec.writes, direction, tokens[:, : int(lengths.max())], lengths, keep, kl)
        if not matched.reached:
            return Steered(matched, [], [])
        both, keep = torch.cat([tokens, tokens]), torch.cat([torch.zeros_like(keep), keep])
        draws = 1 - torch.rand(new_tokens, len(prompts), generator=generator(seed, "steering", latent))  # never 0
        ends = lengths.repeat(2)
        for draw in draws.to(lm.device):
            width = int(ends.max())
            with add(lm.model, spec.writes, matched.strength * direction, keep[:, :width]):
                logits = next_logits(lm, both[:, :width], ends)
            both[torch.arange(len(both), device=lm.device), ends] = _drawn(lm, logits, draw.repeat(2)).to(both)
            ends = ends + 1
    decoder = Decoder(lm.tokenizer)
    texts = [decoder.text(row[len(bos) : end]) for row, end in zip(both.tolist(), ends.tolist(), strict=True)]
    return Steered(matched, texts[: len(prompts)], texts[len(prompts) :])


def _padded(rows: list[list[int]], room: int) -> tuple[Int[Tensor, "rows context"], Int[Tensor, "rows"]]:
    """Returns rows with padding and `room` more places behind, where a model that reads forward does not see them."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max()) + room), PADDING, dtype=torch.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = torch.tensor(row, dtype=torch.int32)
    return tokens, lengths


def _matched(
    lm: LanguageModel,
    sites: Sequence[Site],
    direction: Float[Tensor, "d_out"],
    tokens: Int[Tensor, "rows context"],
    lengths: Int[Tensor, "rows"],
    keep: Bool[Tensor, "rows longer"],
    kl: float,
) -> Matched:
    """Returns the strength at which the mean KL of the next token is `kl`."""
    seen, rows = capture(lm, list(sites), tokens), torch.arange(len(tokens), device=lm.device)
    last = [seen[site.name][rows, lengths - 1].float().to(direction) for site in sites]
    norm = float(torch.cat(last, dim=1).norm(dim=1).mean() / direction.norm())
    clean = next_logits(lm, tokens, lengths)

    def measure(strength: float) -> float:
        with add(lm.model, sites, strength * direction, keep[:, : tokens.shape[1]]):
            amplified = next_logits(lm, tokens, lengths)
        return float(in_float64(kl_of(clean, amplified)).mean())

    return matched_strength(measure, kl, max(START * norm, 1e-6))


def _drawn(
    lm: LanguageModel, logits: Float[Tensor, "rows vocabulary"], draw: Float[Tensor, "rows"]
) -> Int[Tensor, "rows"]:
    """Returns the token at which the cumulative probability reaches each draw; special ones have none."""
    logits[:, [token for token in lm.tokenizer.all_special_ids if token < logits.shape[1]]] = -torch.inf
    logits[:, len(lm.tokenizer) :] = -torch.inf  # room in the matrix that no token uses
    reached = in_float64(logits.softmax(1)).cumsum(1)
    return (reached < draw[:, None] * reached[:, -1:]).sum(1).clamp_max(logits.shape[1] - 1)
