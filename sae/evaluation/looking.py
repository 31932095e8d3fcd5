"""What passes of the language models show of a text, which coders then reconstruct and replace.

Every batch of rows is looked at twice: to reconstruct it, and to measure losses. So much of the first time as fits is
kept for the second; the rest is computed again. Either way the second begins where the first has ended.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor
from torch.utils import _pytree

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.lm.hooks import capture, capture_with_gradients, sites_of_model
from sae.lm.models import LanguageModel
from sae.lm.replay import Made, Stretch, recorded, replayed
from sae.lm.site import Site


@dataclass(frozen=True)
class Seen:
    """What there is at all sites of a batch of rows, and how far the models have come with it."""

    activations: dict[str, Float[Tensor, "rows context _d"]] = field(default_factory=dict)
    gradients: dict[str, Float[Tensor, "rows context _d"]] = field(default_factory=dict)
    """Empty unless a coder looks at them."""
    made: dict[str, dict[Stretch, Made]] = field(default_factory=dict)
    """What modules have made in the stretches of `stretches_of`, by the tag of their model."""

    @property
    def bytes(self) -> int:
        """Returns how much memory it takes."""
        made = [list(stretch.values()) for of in self.made.values() for stretch in of.values()]
        tensors = [x for x in _pytree.tree_leaves([self.activations, self.gradients, made]) if isinstance(x, Tensor)]
        return sum({x.data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


class Looking:
    """Runs the models, as they are, on batches of rows up to the last site of some coders."""

    def __init__(self, coders: dict[str, SparseCoder], models: dict[str, LanguageModel], room: int) -> None:
        self.coders, self.models, self.room = coders, models, room
        self.sites = sites_of(coders)
        self.kept: dict[int, Seen] = {}

    def at(self, number: int, batch: Int[Tensor, "rows context"]) -> Seen:
        """Returns what is seen of batch `number`, and keeps it while there is `room`, in bytes."""
        if number in self.kept:
            return self.kept[number]
        seen = self._look(batch)
        if seen.bytes <= self.room:
            self.room -= seen.bytes
            self.kept[number] = seen
        return seen

    def _look(self, batch: Int[Tensor, "rows context"]) -> Seen:
        asking = [coder.spec for coder in self.coders.values() if coder.spec.selection.looks_at_gradients]
        losses = {spec.selection.gradient_loss or "" for spec in asking}
        if len(losses) > 1:
            raise ConfigError("coders: they look at gradients of different losses; evaluate them one by one")
        seen, home = Seen(), self.models[""].device
        for tag, lm in self.models.items():
            sites = sites_of_model(self.sites, tag)
            if not sites:
                continue
            first = Stretch(tuple(sites))
            with recorded(lm.model, {first, *stretches_of(self.coders, tag)}) as made:
                found = capture(lm, sites, batch)
            seen.activations.update({name: x.to(home) for name, x in found.items()})
            seen.made[tag] = made
            if asking:
                (loss,) = losses
                with replayed(lm.model, made.get(first, {})):
                    slopes = capture_with_gradients(lm, sites, batch, asking[0].mask, loss)[1]
                seen.gradients.update({name: g.to(home) for name, g in slopes.items()})
        return seen


def sites_of(coders: dict[str, SparseCoder]) -> list[Site]:
    """Returns all sites that the coders read or write, each once."""
    return list({site.name: site for c in coders.values() for site in (*c.spec.reads, *c.spec.writes)}.values())


def whole(coders: dict[str, SparseCoder], tag: str) -> Stretch:
    """Returns as much of a pass of one of the models as is made to see all sites."""
    return Stretch(tuple(sites_of_model(sites_of(coders), tag)), to_last=True)


def below(sites: Iterable[Site], tag: str) -> Stretch:
    """Returns as much of a pass of one of the models as is the same whatever happens at some sites."""
    return Stretch(tuple(sites_of_model(sites, tag)))


def stretches_of(coders: dict[str, SparseCoder], tag: str) -> set[Stretch]:
    """Returns what the passes of one model, changed or not, have in common with the one that saw all sites."""
    specs = [coder.spec for coder in coders.values()]
    changed = {below(sites, tag) for s in specs for sites in ((*s.reads, *s.writes), s.writes)}
    return {whole(coders, tag), *(stretch for stretch in changed if stretch.sites)}
