"""Changing what a language model computes at a site: replace by anything, ablate, add a direction, by how much."""

import math
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae.lm.hooks import hooked, model_inputs
from sae.lm.models import ONE_AT_A_TIME, LanguageModel
from sae.lm.site import Site, tagged_columns

MOST_GROWTH = math.log(10)  # of the strength from one guess to the next, while only one side of the target is known


@contextmanager
def replace_at(
    model: nn.Module,
    site: Site,
    new: Callable[[Float[Tensor, "rows context d"]], Float[Tensor, "rows context d"]],
    keep: Bool[Tensor, "rows context"] | None = None,
) -> Iterator[None]:
    """While open, the tensor at `site` is `new(tensor)` at the positions in `keep` and untouched elsewhere."""

    def see(_: Site, x: Tensor) -> Tensor:
        made = new(x).to(x)
        return made if keep is None else torch.where(keep[..., None].to(x.device), made, x)

    with hooked(model, [site], see):
        yield


@contextmanager
def ablate(
    model: nn.Module,
    sites: Sequence[Site],
    keep: Bool[Tensor, "rows context"] | None = None,
    mean: Float[Tensor, "d_out"] | None = None,
    tag: str = "",
) -> Iterator[None]:
    """While open, the tensors at `sites` are zero, or their part of `mean`, at the positions in `keep`.

    Only the sites with this tag are in `model`.
    """

    def new(part: slice) -> Callable[[Tensor], Tensor]:
        def made(x: Tensor) -> Tensor:
            return torch.zeros_like(x) if mean is None else mean[part].to(x).expand_as(x)

        return made

    with ExitStack() as stack:
        for site, part in tagged_columns(sites, tag):
            stack.enter_context(replace_at(model, site, new(part), keep))
        yield


@contextmanager
def add(
    model: nn.Module,
    sites: Sequence[Site],
    direction: Float[Tensor, "d_out"],
    keep: Bool[Tensor, "rows context"] | None = None,
    tag: str = "",
) -> Iterator[None]:
    """While open, its part of `direction` is added to the tensor at each of `sites`, at the positions in `keep`.

    Only the sites with this tag are in `model`.
    """
    with ExitStack() as stack:
        for site, part in tagged_columns(sites, tag):
            stack.enter_context(replace_at(model, site, lambda x, part=part: x + direction[part].to(x), keep))
        yield


@torch.no_grad()
def next_logits(
    lm: LanguageModel, tokens: Int[Tensor, "rows context"], lengths: Int[Tensor, "rows"]
) -> Float[Tensor, "rows vocabulary"]:
    """Returns the logits, in float32, of what follows the first `lengths` tokens of each row; the rest is padding.

    The unembedding sees one position a row: all of them would take gigabytes with a large vocabulary.
    """
    rows, last = torch.arange(len(tokens), device=lm.device), lengths.to(lm.device) - 1

    def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows.to(args[0].device), last.to(args[0].device)][:, None], *args[1:])

    unembedding = lm.model.get_output_embeddings()
    with ONE_AT_A_TIME, ExitStack() as stack:  # `hooked` keeps the shape of what it sees; here it is to change
        if unembedding is not None:
            stack.callback(unembedding.register_forward_pre_hook(narrow).remove)
        logits = lm.model(**model_inputs(lm, tokens)).logits
    return (logits[:, 0] if unembedding is not None else logits[rows, last]).float()


class Matched(NamedTuple):
    """The strength that was found, and what it gives."""

    strength: float
    kl: float
    """In nats."""
    reached: bool
    """Whether `kl` is within the tolerance of the target."""


def matched_strength(
    measure: Callable[[float], float], target: float, start: float, tolerance: float = 0.1, steps: int = 10
) -> Matched:
    """Returns the strength at which `measure(strength)`, a divergence in nats, is within `tolerance` x target.

    After `steps` measurements, the nearest (`guesses`).
    """
    search, found = guesses(target, start, tolerance, steps), None
    while True:
        try:
            found = measure(next(search) if found is None else search.send(found))
        except StopIteration as ended:
            return ended.value


def guesses(target: float, start: float, tolerance: float = 0.1, steps: int = 10) -> Generator[float, float, Matched]:
    """Yields the strengths to be measured in search of a target, takes what each gives, and returns what was found.

    A search on logarithmic scales. A small divergence goes with the square of the strength, which gives a guess a
    little beyond the target; strides double until the target lies between two guesses, and from then on it is
    interpolated.
    """
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    best = Matched(0.0, 0.0, False)
    goal, place, stride = math.log(target), math.log(start), 0.0
    for _ in range(steps):
        strength = math.exp(place)
        found = yield strength
        best = min(best, Matched(strength, found, abs(found - target) <= tolerance * target), key=_miss(target))
        if best.reached:
            break
        capped = found if found < 1e6 * target else 1e6 * target  # NaN, of an overflow, is too much as well
        here = (place, math.log(max(capped, 1e-6 * target, sys.float_info.min)))
        low, high = (here, high) if here[1] < goal else (low, here)
        if low and high:
            share = (goal - low[1]) / (high[1] - low[1])
            place = low[0] + min(0.9, max(0.1, share)) * (high[0] - low[0])
        else:
            stride = min(MOST_GROWTH, max(2 * stride, 0.6 * abs(goal - here[1])))
            place += stride if low else -stride
    return best


def _miss(target: float) -> Callable[[Matched], float]:
    return lambda matched: abs(matched.kl - target) if math.isfinite(matched.kl) else math.inf
