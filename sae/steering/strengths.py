"""How strong an edit is: a value, so many times a latent's largest activation, or what gives a target KL.

    KL = mean over the tokens of the plain greedy continuation of KL(plain || edited) of the next token, in nats

teacher-forced: both models read the prompt and that continuation in one pass. For a target all strengths are multiplied
by one factor (of `scale`, what it differs from 1 by), which is found by bisection on a logarithmic scale.
"""

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.arguments import number, wrong
from sae.base.errors import ConfigError
from sae.base.paths import told_elsewhere
from sae.base.sums import in_float64
from sae.evaluation.doctor import rows_of_documents
from sae.evaluation.evaluation import text_of
from sae.evaluation.metrics import kl_of
from sae.lm.hooks import capture
from sae.lm.intervene import Matched, guesses
from sae.lm.masking import norm_mask, token_mask
from sae.lm.models import LanguageModel
from sae.lm.reading import During, Row
from sae.steering.edits import Edit
from sae.steering.hooks import Steering
from sae.text.documents import TextConfig, documents

log = logging.getLogger(__name__)
TEXT_TOKENS = 16_384  # of the text on which a largest activation is measured
LOOK_S = 0.02  # between looks whether a text is there
START = 0.3  # of the activations' own norm: the first guess at what is to be added
TOLERANCE = 0.1
STEPS, NARROWED, REFINED = 16, 8, 12  # guesses of the search, and of what follows where it ends without
GRID = [2.0**n for n in range(-8, 9, 2)]  # times the first guess: looked at where the search finds nothing
BEYOND = 16.0  # how far behind the last strength one is thought of, half-way to which is looked at
FALLS = 0.02  # of a KL: by how much less a stronger edit must do to count as not monotone
AT_ONCE = 64  # tokens whose distributions are compared together


class Largest(NamedTuple):
    """The largest activations of latents by magnitude, and where that is known from."""

    values: Mapping[int, float]
    source: str = "as given"


@dataclass(frozen=True)
class Strength:
    """An edit as it was asked for, and the strength that was used."""

    asked: Edit
    value: float | None
    """In the latent's own units (of `scale`, the factor); None of `ablate`, and before a target KL has found it."""
    largest: float | None = None
    """The latent's largest activation, where it is known."""
    source: str = ""
    """Where that is known from."""

    def at(self, factor: float) -> Edit:
        """Returns the edit with its strength multiplied."""
        if self.asked.how == "ablate":
            return self.asked
        value = 1.0 if self.value is None else self.value
        strength = (
            1 + factor * (value if self.value is None else value - 1) if self.asked.how == "scale" else factor * value
        )
        return replace(self.asked, strength=strength, unit="value")

    def __str__(self) -> str:
        if self.value is None:
            return str(self.asked)
        told = str(replace(self.asked, strength=self.value, unit="value"))
        if self.asked.how == "scale":
            return told
        of = "in its own units; its largest activation is not known"
        if self.largest:
            of = f"{self.value / self.largest:.3g} of its largest activation, {self.largest:.4g} {self.source}"
        return f"{told} ({'clamped; ' * (self.asked.how == 'clamp')}{of})"


def ready(
    steering: Steering, edits: Sequence[Edit], largest: Largest | None = None
) -> Generator[None, None, tuple[Strength, ...]]:
    """Returns edits with their strengths as values; of one without a strength, which a target KL is to find, none.
    Yields while it measures.

    What `largest` does not know is measured on text, which is said: that of the coder's training where it lies here,
    else Python's documentation. ConfigError for a latent that fires nowhere there.
    """
    known = largest or Largest({})
    missing = {edit.latent for edit in edits if edit.unit == "largest"} - known.values.keys()
    if new := missing - steering.measured.keys():
        found = yield from measured_largest(steering, sorted(new))
        steering.measured |= {latent: (found.values[latent], found.source) for latent in new}
    strengths = []
    for edit in edits:
        seen = steering.measured[edit.latent] if edit.latent in missing else None
        most, source = seen or (known.values.get(edit.latent), known.source)
        if edit.unit == "largest" and not most:
            raise ConfigError(f"edits: {edit}: latent {edit.latent} fires nowhere ({source}); say a value")
        value = edit.strength if edit.unit == "value" or edit.strength is None else edit.strength * (most or 0.0)
        strengths.append(Strength(edit, value, most, source if most else ""))
    return tuple(strengths)


def measured_largest(steering: Steering, latents: Sequence[int]) -> Generator[None, None, Largest]:
    """Returns the largest activation by magnitude of some latents on text, at tokens that are not masked; yields
    between passes of the model, and while the text is looked for.
    """
    said = text_of(steering.spec) if "text" in steering.spec.training else TextConfig()
    config = said if Path(said.source).expanduser().exists() else TextConfig()
    name = "Python's documentation" if config.source == "quickstart" else told_elsewhere(config.source)
    text = documents(config)
    pool = ThreadPoolExecutor(1)
    first = pool.submit(next, text, None)  # a folder of many files may take seconds to list
    pool.shutdown(wait=False)
    while wait([first], LOOK_S).not_done:
        yield
    begun = [one for one in (first.result(),) if one]
    rows = rows_of_documents(steering.lm, steering.spec, TEXT_TOKENS, chain(begun, text), name)
    found = dict.fromkeys(latents, 0.0)
    for row in rows.split(1):
        yield
        found = {latent: max(found[latent], most) for latent, most in _largest_in(steering, row, latents).items()}
    told = f"on {rows.numel():,} tokens of {name}"
    log.info("largest activations were measured %s", told)
    return Largest(found, told)


@torch.no_grad()
def _largest_in(steering: Steering, rows: Int[Tensor, "n context"], latents: Sequence[int]) -> dict[int, float]:
    lm, spec = steering.lm, steering.spec
    seen = {name: x.to(steering.coder.device) for name, x in capture(lm, steering.seen, rows).items()}
    limits = {name: limit for name, limit in spec.mask.norm_limits.items() if name in seen}
    mask = replace(spec.mask, norm_limits=limits, next_token=False)
    keep = (token_mask(rows, mask).to(steering.coder.device) & norm_mask(seen, mask)).flatten()
    inputs = torch.cat([seen[site.name].float() for site in spec.reads], dim=-1).flatten(0, 1)
    codes = steering.coder.encode(inputs[keep], latents=list(latents))
    return {latent: max(codes.values[codes.ids == latent].abs().tolist(), default=0.0) for latent in latents}


@torch.no_grad()
def logits_after(
    lm: LanguageModel, prompt: Sequence[int], written: Sequence[int], during: During | None = None
) -> Float[Tensor, "written vocabulary"]:
    """Returns the logits from which each of some written tokens is predicted, of one pass."""
    return Row(lm, during, keeps=False).read([*prompt, *written[:-1]], len(written))


def kl_by_token(clean: Float[Tensor, "n vocabulary"], edited: Float[Tensor, "n vocabulary"]) -> Float[Tensor, "n"]:
    """Returns KL(clean || edited) at each token in nats, which rounding does not make negative."""
    pairs = zip(clean.split(AT_ONCE), edited.split(AT_ONCE), strict=True)
    return torch.cat([kl_of(p, q) for p, q in pairs]).clamp_min(0)


def known_largest(given: Any) -> Largest | None:
    """Returns largest activations as they were given by latent; TypeError for what are none."""
    if given is None or isinstance(given, Largest):
        return given
    if not isinstance(given, Mapping):
        raise wrong("largest", given, "largest activations by latent, as {508: 3.2}")
    return Largest({latent: number("largest", value) for latent, value in given.items()})


class OfTarget(NamedTuple):
    """Strengths that reach a target KL."""

    strengths: tuple[Strength, ...]
    monotone: bool
    """Whether, of the strengths that were tried, each stronger one did as much; else others may reach it as well."""


def strengths_for(
    steering: Steering,
    strengths: Sequence[Strength],
    prompt: Sequence[int],
    written: Sequence[int],
    target: float,
) -> Generator[None, None, OfTarget]:
    """Returns strengths at which the mean KL over the written tokens is within 10 % of a target; yields between passes.

    ConfigError names the nearest KL and its strengths if none reaches it.
    """
    clean = logits_after(steering.lm, prompt, written)

    seen: dict[float, float] = {}
    search = searched(target, _first_guess(steering, strengths, [*prompt, *written]), seen)
    factor, found = next(search), None
    while found is None:
        during = steering.during([one.at(factor) for one in strengths], len(prompt))
        edited = logits_after(steering.lm, prompt, written, during)
        kl = float(in_float64(kl_by_token(clean, edited)).mean())
        seen[factor] = kl if math.isfinite(kl) else math.inf  # of an overflow: too much
        yield
        try:
            factor = search.send(seen[factor])
        except StopIteration as ended:
            found = ended.value
    used = tuple(replace(one, value=one.at(found.strength).strength) for one in strengths)
    if not found.reached:
        told = ", ".join(str(one.at(found.strength)) for one in strengths)
        raise ConfigError(f"kl: {target:g} nats cannot be reached; the nearest is {found.kl:.4g}, with {told}")
    return OfTarget(used, is_monotone(seen))


def searched(target: float, start: float, seen: Mapping[float, float]) -> Generator[float, float, Matched]:
    """Yields the strengths to be tried for a target, and returns the one that is within 10 %, or the nearest.

    Whoever tries them keeps in `seen` what each gave, and sends it. Where the search that takes the divergence for
    monotone ends without, more strengths are looked at, and neighbors on both sides of the target are bisected.
    """
    best = yield from guesses(target, start, TOLERANCE, STEPS)
    if best.reached:
        return best
    for step in GRID:
        yield start * step
    for _ in range(NARROWED):  # towards the lowest or highest there is
        if _around(target, seen):
            break
        places = sorted(seen)
        place = min(range(len(places)), key=lambda n: abs(seen[places[n]] - target))
        beyond = [places[0] / BEYOND, *places, places[-1] * BEYOND]
        for other in (beyond[place], beyond[place + 2]):
            yield (places[place] * other) ** 0.5
    for low, high in _around(target, seen):
        for _ in range(REFINED):
            middle = (low * high) ** 0.5
            yield middle
            low, high = (middle, high) if (seen[middle] < target) == (seen[low] < target) else (low, middle)
    nearest = min(seen, key=lambda strength: abs(seen[strength] - target))
    return Matched(nearest, seen[nearest], abs(seen[nearest] - target) <= TOLERANCE * target)


def _around(target: float, seen: Mapping[float, float]) -> list[tuple[float, float]]:
    """Returns the neighbors between which what they gave passes a target."""
    return [(low, high) for low, high in pairwise(sorted(seen)) if (seen[low] < target) != (seen[high] < target)]


def is_monotone(seen: Mapping[float, float]) -> bool:
    """Returns whether each stronger one of the strengths that were tried did at least as much."""
    values = [seen[strength] for strength in sorted(seen)]
    return all(b >= a * (1 - FALLS) - 1e-6 for a, b in pairwise(values))


@torch.no_grad()
def _first_guess(steering: Steering, strengths: Sequence[Strength], tokens: Sequence[int]) -> float:
    """Returns the factor at which clamped and added latents together write a share of what is there."""
    moved = [edit for edit in (one.at(1.0) for one in strengths) if edit.how in ("clamp", "add") and edit.strength]
    if not moved:
        return 1.0
    spec, coder = steering.spec, steering.coder
    sites = list({site.name: site for site in (*spec.reads, *spec.writes)}.values())
    seen = {
        name: x[0].to(coder.device).float() for name, x in capture(steering.lm, sites, torch.tensor([tokens])).items()
    }
    inputs, there = (torch.cat([seen[site.name] for site in side], dim=-1) for side in (spec.reads, spec.writes))
    amounts = torch.tensor([edit.strength or 0.0 for edit in moved], device=coder.device)
    direction = amounts @ coder.decoder_rows([edit.latent for edit in moved]) * spec.normalize(inputs)[1][1]
    if not direction.norm() > 0:
        raise ConfigError(f"kl: latent {moved[0].latent} writes nothing, its row of the decoder is zero")
    return float(START * there.norm(dim=-1).median() / direction.reshape(-1, spec.d_out).norm(dim=-1).median())
