"""What the language model loses when coders are spliced in, or what they write is ablated.

Each arm begins where it first differs from the model as it is: what lies below was computed to see the sites.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.sums import in_float64
from sae.coder.coder import SparseCoder
from sae.coder.splicing import reads_ahead, splice
from sae.evaluation.figures import side_by_side
from sae.evaluation.looking import Looking, Seen, below, whole
from sae.evaluation.metrics import kl_divergence, loss_recovered
from sae.evaluation.sharing import Sharing
from sae.lm.hooks import model_inputs, next_token_losses, sites_of_model
from sae.lm.intervene import ablate
from sae.lm.masking import next_token_mask, norm_mask, token_mask
from sae.lm.replay import replayed

ARMS = ("spliced", "zero", "mean")
SUMMED = ("tokens", "clean", *ARMS, *(f"kl_{arm}" for arm in ARMS))


def writing(coders: dict[str, SparseCoder], tag: str) -> dict[str, SparseCoder]:
    """Returns the coders that write in one of the models what can be replaced there."""
    able = {name: c for name, c in coders.items() if all(site.side != "normalized" for site in c.spec.writes)}
    return {name: coder for name, coder in able.items() if sites_of_model(coder.spec.writes, tag)}


def losses(
    coders: dict[str, SparseCoder],
    looking: Looking,
    tag: str,
    batches: list[Int[Tensor, "_rows context"]],
    means: dict[str, Float[Tensor, "_d"]],
    advance: Callable[[], None],
    sharing: Sharing,
) -> dict[str, dict[str, Any]]:
    """Returns the losses of one model with the sites replaced that each coder writes; all of them write in it."""
    sums = torch.zeros(len(coders), len(SUMMED), dtype=torch.float64)
    with sharing.measuring():
        for number, batch in enumerate(batches):
            sums += _sums(coders, looking, tag, batch, looking.at(number, batch), means, advance)
    sharing.add_up([sums])
    return {name: _table(*of) for name, of in zip(coders, sums.tolist(), strict=True)}


def _sums(
    coders: dict[str, SparseCoder],
    looking: Looking,
    tag: str,
    batch: Int[Tensor, "rows context"],
    seen: Seen,
    means: dict[str, Float[Tensor, "_d"]],
    advance: Callable[[], None],
) -> Float[Tensor, "coders summed"]:
    """Returns what is `SUMMED` over the tokens of one batch, by coder."""
    lm, made = looking.models[tag], seen.made[tag]
    tokens = batch.to(lm.device)

    def logits() -> Tensor:
        return lm.model(**model_inputs(lm, tokens)).logits

    def added(found: Float[Tensor, "counted"]) -> float:
        return float(in_float64(found).sum())

    with replayed(lm.model, made.get(whole(looking.coders, tag), {})):
        clean = logits()
    ablated: dict[Any, dict[str, float]] = {}  # the same for all coders of the same sites and mask
    sums = []
    for name, coder in coders.items():
        advance()
        spec = coder.spec
        keep = token_mask(tokens, spec.mask) & norm_mask(seen.activations, spec.mask).to(lm.device)
        g = side_by_side(seen.gradients, spec.writes) if spec.selection.looks_at_gradients else None
        given = seen.activations if reads_ahead(spec) else None
        arms: dict[str, Any] = {
            "spliced": splice(lm.model, coder, keep, False, given, g, tag),
            "zero": ablate(lm.model, spec.writes, keep, tag=tag),
            "mean": ablate(lm.model, spec.writes, keep, means[name], tag),
        }
        total: dict[str, float] = {}
        for arm, change in arms.items():
            key = (name if arm == "spliced" else arm, tuple(site.name for site in spec.writes), str(spec.mask))
            if key not in ablated:
                sites = (*spec.reads, *spec.writes) if arm == "spliced" else spec.writes
                with replayed(lm.model, made.get(below(sites, tag), {})), change:
                    patched = logits()
                kl = kl_divergence(clean, patched, next_token_mask(tokens, keep))
                ablated[key] = {arm: added(next_token_losses(patched, tokens, keep)), f"kl_{arm}": added(kl)}
            total |= ablated[key]
        key = ("clean", str(spec.mask))
        if key not in ablated:
            found = next_token_losses(clean, tokens, keep)
            ablated[key] = {"tokens": float(len(found)), "clean": added(found)}
        total |= ablated[key]
        sums.append([total[label] for label in SUMMED])
    return torch.tensor(sums, dtype=torch.float64)


def _table(tokens: float, *sums: float) -> dict[str, Any]:
    count = int(tokens)
    ce = {name: value / max(1, count) for name, value in zip(SUMMED[1:], sums, strict=True)}
    return {
        "tokens": count,
        **{f"ce_{name}": ce[name] for name in ("clean", "spliced", "zero", "mean")},
        "ce_added": ce["spliced"] - ce["clean"],
        "ce_recovered": loss_recovered(ce["clean"], ce["spliced"], ce["zero"]),
        "ce_recovered_from_mean": loss_recovered(ce["clean"], ce["spliced"], ce["mean"]),
        **{name: ce[name] for name in ("kl_spliced", "kl_zero", "kl_mean")},
        "kl_score": loss_recovered(0.0, ce["kl_spliced"], ce["kl_zero"]),
    }
