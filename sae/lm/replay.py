"""Passes over the same tokens that differ from some site on: what lies below it is computed once and given again.

A module that has finished before a site is reached makes the same in every pass that changes nothing but that site.
While a pass is `recorded`, what such modules make is kept; while it is `replayed`, they hand it out and compute
nothing. Whether a model can do without their work is tried on a few tokens, for a layer may leave something behind
beside what it returns; of one that cannot, nothing is kept.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from sae.lm.calls import probed, runs_of
from sae.lm.models import ONE_AT_A_TIME
from sae.lm.probing import inputs_of, plain_ids, reader_of
from sae.lm.site import Site
from sae.lm.sites import find_module

Made = dict[nn.Module, Any]
"""What modules have made of some tokens."""


@dataclass(frozen=True)
class Stretch:
    """So much of a pass: up to the first of some sites or, with `to_last`, up to the last of them."""

    sites: tuple[Site, ...]
    to_last: bool = False

    def __post_init__(self) -> None:
        places = tuple(Site(site.hook, site.side) for site in self.sites)  # whatever else is known of them
        object.__setattr__(self, "sites", places)


@contextmanager
def recorded(model: nn.Module, stretches: Iterable[Stretch]) -> Iterator[dict[Stretch, Made]]:
    """While open, one pass may be made; afterwards, what modules have made in each stretch is there.

    A stretch is left out if the model cannot go on without it, or if later modules change in place what they are given.
    Only the last module of a list has its output kept: those before it have handed theirs on.
    """
    tracked = not torch.is_inference_mode_enabled()  # whether tensors say that they were changed
    with _recorded(model, [each for each in stretches if tracked and _can_replay(model, each)]) as found:
        yield found


@contextmanager
def replayed(model: nn.Module, made: Made) -> Iterator[None]:
    """While open, modules hand out what they have made of the same tokens; what is inside of them does not run."""
    with ONE_AT_A_TIME:
        own = {module: vars(module).get("forward") for module in made}
        try:
            for module, out in made.items():
                module.forward = lambda *_args, _out=out, **_kwargs: _out
            yield
        finally:
            for module, forward in own.items():
                if forward is None:
                    del module.forward
                else:  # accelerate's
                    module.forward = forward


@contextmanager
def _recorded(model: nn.Module, stretches: list[Stretch]) -> Iterator[dict[Stretch, Made]]:
    once = {module for module, runs in runs_of(model).items() if runs == 1}
    beside = {module: list(each) for each in model.modules() if isinstance(each, nn.ModuleList) for module in each}
    left = {stretch: len(stretch.sites) if stretch.to_last else 1 for stretch in stretches}
    found: dict[Stretch, Made] = {}
    made: dict[nn.Module, tuple[Any, list[int]]] = {}
    kept: dict[Stretch, list[tuple[Tensor, int]]] = {}

    def finished(module: nn.Module, out: Any) -> None:
        if left and id(model) not in probed:
            for part in module.modules():
                made.pop(part, None)
            for other in beside.get(module, ()):
                if other in made:
                    made[other] = _pytree.tree_map_only(Tensor, _blank, made[other][0]), []
            if module in once:
                made[module] = out, [x._version for x in _tensors(out)]

    def reached(site: Site) -> None:
        for stretch in [each for each in left if site in each.sites] if id(model) not in probed else ():
            left[stretch] -= 1
            if not left[stretch]:
                del left[stretch]
                found[stretch] = {module: out for module, (out, _) in made.items()}
                pairs = (zip(_tensors(out), versions, strict=False) for out, versions in made.values())  # blanks: none
                kept[stretch] = list(itertools.chain.from_iterable(pairs))
        if not left:
            made.clear()

    with ONE_AT_A_TIME:
        sites = {site: find_module(model, site) for stretch in stretches for site in stretch.sites}
        watched = model.modules() if left else ()
        handles = [each.register_forward_hook(lambda module, _, out: finished(module, out)) for each in watched]
        for site, (module, side) in sites.items():
            add: Any = module.register_forward_hook if side == "output" else module.register_forward_pre_hook
            handles.append(add(lambda *_, site=site: reached(site)))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()
    for stretch, pairs in kept.items():
        if any(x._version != version for x, version in pairs):
            del found[stretch]


def _tensors(out: Any) -> list[Tensor]:
    return [x for x in _pytree.tree_leaves(out) if isinstance(x, Tensor)]


def _blank(x: Tensor) -> Tensor:
    """Returns a tensor of the same shape that takes no memory and, if somebody does read it, is seen to be wrong."""
    return x.new_full((), math.nan).expand(x.shape) if x.is_floating_point() else x


_known: WeakKeyDictionary[nn.Module, dict[Stretch, bool]] = WeakKeyDictionary()


@torch.no_grad()
def _can_replay(model: nn.Module, stretch: Stretch) -> bool:
    """Returns whether a model makes the very same of a few tokens when a stretch is replayed; tried once."""
    known = _known.setdefault(model, {})
    if stretch not in known:

        def logits() -> Tensor:
            return reader_of(model)(**inputs_of(plain_ids(model), None))[0]

        with _recorded(model, [stretch]) as found:
            expected = logits()
        try:
            with replayed(model, found.get(stretch, {})):
                known[stretch] = stretch in found and torch.equal(logits(), expected)
        except Exception:  # anything that a model's own code may raise where something is missing
            known[stretch] = False
    return known[stretch]
