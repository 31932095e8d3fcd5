"""What is measured of a coder from activations alone: how well it reconstructs, and how its latents fire."""

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base.errors import ConfigError
from sae.base.progress import Watch
from sae.coder.coder import SparseCoder
from sae.evaluation.metrics import Reconstruction, head_shares
from sae.evaluation.models import check_placed
from sae.evaluation.nulls import null_fvus
from sae.evaluation.sharing import Sharing, joined
from sae.lm.masking import norm_mask
from sae.lm.site import Site, columns_of
from sae.stream.drawn import Drawn, is_iterator
from sae.stream.tensors import TensorSource, cut, divided, given_activations

log = logging.getLogger(__name__)
BLOCK = 2048  # vectors measured at once
GRADIENT_MODE = " (with gradients)"
WITH_GRADIENTS = "latents selected with gradients of later losses: these figures see the future"


class Figures:
    """What is added up of one coder, from activations alone."""

    def __init__(self, coder: SparseCoder, nulls: bool) -> None:
        self.coder, self.nulls, sizes = coder, nulls, (coder.spec.d_sae, coder.spec.d_out)
        self.filtered, self.unfiltered, self.skipped = (Reconstruction(*sizes) for _ in range(3))
        self.held: list[tuple[Tensor, Tensor]] = []

    def update(self, seen: dict[str, Float[Tensor, "n _d"]], gradients: dict[str, Float[Tensor, "n _d"]]) -> None:
        """Takes in the activations (and gradients, if the coder looks at them) of the tokens that count, by site."""
        coder, spec, device = self.coder, self.coder.spec, self.coder.device
        own = {site.name: seen[site.name] for site in (*spec.reads, *spec.writes)}
        x, target = (side_by_side(own, side).to(device) for side in (spec.reads, spec.writes))
        usual = norm_mask(own, spec.mask).to(device)
        g = side_by_side(gradients, spec.writes).to(device) if spec.selection.looks_at_gradients else None
        out, latents = coder(x, g)
        self.unfiltered.update(target, out, latents)
        if not usual.all():
            x, target, out, latents = x[usual], target[usual], out[usual], latents[usual]
        self.filtered.update(target, out, latents)
        if spec.skip:
            none = latents.with_values(torch.zeros_like(latents.values))
            self.skipped.update(target, coder.decode(none, x) + coder.skipped(x), none)
        if self.nulls:
            self.held.append((x.cpu(), target.cpu()))

    def sums(self) -> list[Tensor]:
        """Returns all that was added up, itself."""
        return [part for of in (self.filtered, self.unfiltered, self.skipped) for part in of.sums()]

    def result(self, name: str, sharing: Sharing) -> dict[str, Any]:
        """Returns the metrics of pass 1, its sums being those of all ranks; ConfigError if no token counts."""
        spec = self.coder.spec
        self.filtered.nmse = [sharing.in_order(joined(self.filtered.nmse))]
        if not self.filtered.target.n:
            raise ConfigError(f"coder {name}: its mask leaves none of the held-out tokens; there is nothing to measure")
        writes, unmasked = spec.writes, self.unfiltered.result()
        found: dict[str, Any] = {
            "reconstruction": self.filtered.result(),
            "reconstruction_unfiltered": {key: unmasked[key] for key in ("tokens", "fvu", "ev")},
            "density": self.filtered.density(),
        }
        if len(writes) > 1:
            columns = zip(writes, columns_of(writes), strict=True)
            found["fvu_by_site"] = {site.name: self.filtered.fvu(part) for site, part in columns}
        if spec.skip:
            found["skip"] = {"ev": self.skipped.result()["ev"]}
        if len(writes) == 1 and writes[0].heads:
            found["heads"] = head_shares(self.coder.W_dec, writes[0].heads, self.filtered.fired > 0)
        if self.nulls:
            sides = (joined([pair[i] for pair in self.held], width) for i, width in enumerate((spec.d_in, spec.d_out)))
            found["nulls"] = sharing.of_first(list(sides), self._nulls)
        return found

    def _nulls(self, x: Tensor, target: Tensor) -> dict[str, dict[str, float]]:
        return null_fvus(self.coder, (x[::2], target[::2]), (x[1::2], target[1::2]))


def results_of(figures: dict[str, Figures], sharing: Sharing) -> dict[str, Any]:
    """Returns the metrics of pass 1 by coder, of what all ranks have taken in, whose sums are there from now on."""
    sharing.add_up([part for found in figures.values() for part in found.sums()])
    return {name: found.result(name, sharing) for name, found in figures.items()}


def both_modes(coders: dict[str, SparseCoder]) -> dict[str, SparseCoder]:
    """Returns the coders as they are asked without gradients and, of rules that can look at them, with."""
    modes = dict(coders)
    for name, coder in coders.items():
        for looks, label in ((False, name), (True, name + GRADIENT_MODE)):
            rule = coder.spec.selection.with_gradients(looks)
            if rule.looks_at_gradients == looks:
                modes[label] = coder.with_spec(coder.spec.with_(selection=rule))
    return modes


def fold_modes(results: dict[str, Any], coders: dict[str, SparseCoder]) -> None:
    """Puts the figures of coders that were asked with gradients, labeled, below those of the same coder without."""
    for name in results.keys() - coders.keys():
        results[name.removesuffix(GRADIENT_MODE)]["with_gradients"] = {"label": WITH_GRADIENTS, **results.pop(name)}


def side_by_side(tensors: dict[str, Tensor], sites: Iterable[Site]) -> Tensor:
    """Returns the sites' activations side by side, in float32."""
    return torch.cat([tensors[site.name].float() for site in sites], dim=-1)


def without_overflow(found: Any) -> Any:
    """Returns metrics with None for what overflowed: a number that is none must not look like one or break the JSON."""
    if isinstance(found, dict):
        return {key: without_overflow(value) for key, value in found.items()}
    return None if isinstance(found, float) and not math.isfinite(found) else found


def held_out_of(given: Any, coders: dict[str, SparseCoder], tokens: int) -> TensorSource:
    """Returns what is to be measured on of given activations: of those that the coder was trained on, what it was not.

    Of an iterator, the next `tokens` vectors. Of others, all; or what lies in their folder for held-out ones, if they
    have it. ConfigError if they lack a site.
    """
    spec = next(iter(coders.values())).spec
    check_placed(coders)
    if is_iterator(given):
        given = [block.activations for block in Drawn(given, spec.reads[0].name, BLOCK).peek(tokens).blocks]
    stored = given_activations(given, spec.reads[0].name)
    names = list({site.name: None for c in coders.values() for site in (*c.spec.reads, *c.spec.writes)})
    trained = spec.training.get("tensors", {})
    if trained.get("fingerprint") == stored.fingerprint:
        source = divided(stored, names, trained["block"], trained["held_out_share"], trained["skip_positions"])[1]
    else:
        source = cut(stored.held_out or stored.shards, names, BLOCK, skip_positions=spec.mask.skip_positions)
    apart = stored.held_out or trained.get("fingerprint") == stored.fingerprint
    log.info("%s", f"activations: {source.vectors:,} vectors of {stored.label}, {'held out' if apart else 'all'}")
    return source


def evaluate_stored(
    coders: dict[str, SparseCoder], source: TensorSource, tokens: int, nulls: bool, watch: Watch, sharing: Sharing
) -> dict[str, Any]:
    """Returns the metrics of coders on about `tokens` vectors, in blocks spread evenly over stored activations."""
    modes = {
        name: coder
        for name, coder in both_modes(coders).items()
        if source.with_gradients or not coder.spec.selection.looks_at_gradients
    }
    n, each = len(source), max(1, source.vectors // max(1, len(source)))
    count = min(n, max(1, -(-tokens // each)))
    figures, own = {name: Figures(coder, nulls) for name, coder in modes.items()}, sharing.share.of(count)
    with torch.no_grad(), watch.stage("evaluating", len(own), "blocks", visible=sharing.shows) as stage:
        with sharing.measuring():
            for number in own:
                watch.poll("during evaluation")
                block = source.read(number * n // count)
                for found in figures.values():
                    found.update(block.activations, block.gradients)
                stage.update(stage.n + 1)
        results = results_of(figures, sharing)
    fold_modes(results, coders)
    return without_overflow(results)
