"""What passes of language models take in a run: the FLOPs of their products with weights, two a token and weight.

Passes over the same tokens begin where they first differ (`sae/lm/replay.py`), so what one takes depends on where its
sites lie. Products of activations with each other, in attention, are not counted.
"""

from collections.abc import Iterable

from sae.evaluation.evaluation import PASS_LOGITS
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.training.config import TrainConfig
from sae.training.end_to_end import KEPT_LOGITS
from sae.training.planning import CoderPlan

SPARSELY = 3.2
"""FLOPs of a step for each weight of the encoder: a dense product there, and the rest sparse."""
SEEN = 3
"""What is held of a token that is evaluated, as wide as the sites: activations, and what the model goes on from."""
Read = list[tuple[LanguageModel, list[Site]]]
"""Models, with the sites that are read of each."""


class Depths:
    """How much of a model runs before a site is seen, counted in weights that each token is multiplied with."""

    def __init__(self, lm: LanguageModel) -> None:
        self.model, self.order = lm.model, {name: i for i, (name, _) in enumerate(lm.model.named_modules())}
        embedding, head = lm.model.get_input_embeddings(), getattr(lm.model, "get_output_embeddings", lambda: None)()
        self.looked_up = set() if embedding is None else {id(p) for p in embedding.parameters()}
        multiplied = set() if head is None else {id(p) for p in head.parameters()}
        self.whole = sum(p.numel() for p in lm.model.parameters() if id(p) not in self.looked_up - multiplied)

    def until(self, site: Site) -> int:
        """Returns the weights that come before a site."""
        last = self.order[site.hook]
        before = [self.model.get_submodule(name) for name, place in self.order.items() if place < last]
        found = {id(p): p for module in before for p in module.parameters(recurse=False)}
        if site.side != "input":
            found |= {id(p): p for p in self.model.get_submodule(site.hook).parameters()}
        return sum(p.numel() for name, p in found.items() if name not in self.looked_up)

    def first(self, sites: Iterable[Site]) -> int:
        """Returns the weights before the first of some sites."""
        return min(map(self.until, sites))

    def last(self, sites: Iterable[Site]) -> int:
        """Returns the weights before the last of some sites."""
        return max(map(self.until, sites))


def reading(config: TrainConfig, models: Read) -> float:
    """Returns the FLOPs that read the activations of a token: up to the last site, or to the loss and back."""
    found = 0
    for lm, sites in models:
        depths = Depths(lm)
        found += 2 * depths.whole - depths.first(sites) if config.gradient_loss else depths.last(sites)
    return 2.0 * found


def encoding(plan: CoderPlan) -> int:
    """Returns the weights of a coder's encoder that a token is multiplied with."""
    return plan.d_in // plan.spec.n_blocks * plan.d_sae * len(plan.spec.encoding.maps)


def of_coder(config: TrainConfig, models: Read, plan: CoderPlan) -> float:
    """Returns the FLOPs that a step of a coder takes of a token, beside what all coders of a run share."""
    found = SPARSELY * encoding(plan)
    if any(term.needs_rows for term in plan.coder.objectives.values() if term.weight):
        ((lm, _),) = models
        depths = Depths(lm)
        found += 4.0 * (depths.whole - depths.first(plan.writes))
    return found


def end_to_end(config: TrainConfig, models: Read, plans: list[CoderPlan], ranks: int) -> float:
    """Returns the FLOPs that a token takes in losses that run the model, beside reading it.

    The rest of the clean pass or, of several micro-batches, all of it; of every coder, a pass from where it writes, and
    back. Where clean logits of the micro-batches are more than is kept, each coder computes them anew.
    """
    ((lm, sites),) = models
    depths, micro = Depths(lm), config.micro_batch_tokens or config.batch_tokens
    clean: float = depths.whole
    if micro < config.batch_tokens:
        logits = -(-micro // ranks) * lm.model.config.get_text_config().vocab_size
        kept = min(1.0, KEPT_LOGITS // logits * micro / config.batch_tokens)
        clean *= len(plans) - (len(plans) - 1) * kept
    elif all(len(plan.writes) == 1 for plan in plans):
        clean -= depths.last(sites)
    return 2.0 * clean + 4.0 * sum(depths.whole - depths.first(plan.writes) for plan in plans)


def evaluation(config: TrainConfig, models: Read, plans: list[CoderPlan]) -> float:
    """Returns the FLOPs that one evaluation takes of a token.

    A pass up to the last site, and again if it is not kept until losses are measured; from there on the clean one; from
    where they begin to differ, two ablations of all coders with the same sites, and every coder's own. Coders that
    choose by gradients are asked with them as well.
    """
    asking, total = [plan for plan in plans if plan.spec.selection.gradient_loss], 0.0
    wide = sum({name: site.width for plan in plans for name, site in plan.sites.items()}.values())
    kept = min(1.0, PASS_LOGITS / max(1, config.eval.tokens * SEEN * wide))
    for lm, sites in models:
        depths, tag = Depths(lm), sites[0].tag
        able = [plan for plan in plans if lm.is_causal and _written(plan, tag)]
        seen = depths.last(sites) + (2 * (depths.whole - depths.first(sites)) if asking else 0)
        total += 2.0 * seen * (2 - kept if able else 1)
        if able:
            total += 2.0 * (depths.whole - depths.last(sites))
        alike = {(tuple(plan.sites), tuple(site.name for site in plan.writes)): plan for plan in able}
        total += 4.0 * sum(depths.whole - depths.first(_written(plan, tag)) for plan in alike.values())
        for plan in (*able, *(plan for plan in able if plan in asking)):
            both = [site for site in plan.sites.values() if site.tag == tag]
            total += 2.0 * (depths.whole - depths.first(both))
    return total


def _written(plan: CoderPlan, tag: str) -> list[Site]:
    """Returns the sites of a model that a coder writes, if all that it writes can be replaced."""
    able = all(site.side != "normalized" for site in plan.writes)
    return [site for site in plan.writes if site.tag == tag] if able else []
