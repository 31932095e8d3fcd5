"""The doctor: does a coder fit the activations that it is given, and if it does not, which usual mistake explains it?

About two thousand tokens go through the language model once, which captures the sites of all candidates: every usual
mistake of loading (`sae/alternatives.py`) turned into the coder that was meant. All are measured on the same tokens and
ranked by

    score = ln FVU + |ln(L0 / L0*)|        lower is better; L0* is the advertised L0

so that a code twice too dense or too sparse must halve the error to be worth it. Without an advertised L0 the second
term is a tenth of ln L0: sparser is better where the error is the same.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sae.activations import capture, norm_mask, token_mask, widths
from sae.alternatives import MAPS, PLACES, Subject, rebuilt
from sae.coder import SparseCoder
from sae.documents import TextConfig, documents
from sae.errors import ConfigError
from sae.metrics import Reconstruction
from sae.models import LanguageModel, load_language_model
from sae.packing import PADDING, Packer
from sae.selection import Budget, Selection
from sae.sites import resolve
from sae.spec import CoderSpec, MaskSpec, Site
from sae.text import CHARS_PER_TOKEN, encode, special_ids

LEAST_EV = 0.2
MOST_L0_FACTOR = 2.0
MARGIN = 0.05
CONTEXT = 256
NORM_FILTER = 10.0
SHOWN = 6
ROWS, PART = 8, 1024
LEAST_L0, LEAST_FVU, PRICE = 0.01, 1e-9, 0.1


@dataclass(frozen=True)
class Candidate:
    """What the coder would be with one usual mistake undone (or two)."""

    mistake: str
    """Its name, or those of all that come to the same coder."""
    change: str
    """What to say instead: arguments of `sae.load`, or fields of the spec."""
    ev: float | None
    l0: float
    score: float
    """As at the head of this module; lower is better."""
    coder: SparseCoder = field(repr=False, compare=False)
    """The coder with the change made; it shares its tensors."""


@dataclass(frozen=True)
class Report:
    """What the doctor found. Figures are over usual tokens: not special, not first in the row, no outlier by norm."""

    tokens: int
    """Usual tokens."""
    l0: float
    advertised_l0: float | None
    ev: float | None
    """Explained variance; None where the target is constant."""
    ev_with_sinks: float | None
    """The same with BOS, first positions and outliers: what a coder does that was not trained on them, or that was."""
    cosine: float
    norm_ratio: float
    """Mean |reconstruction| / |target|."""
    score: float
    healthy: bool
    verdict: str
    """One line."""
    candidates: list[Candidate]
    """Best first."""

    def lines(self) -> list[str]:
        """Returns the report as lines of text."""
        advertised = "" if self.advertised_l0 is None else f" (advertised {self.advertised_l0:.4g})"
        shown = self.candidates[:SHOWN]
        width = max([len(c.mistake) for c in shown], default=0)
        return [
            self.verdict,
            f"  L0 {self.l0:.4g}{advertised}, EV {_number(self.ev)}, cosine {self.cosine:.3f}, "
            f"norm ratio {self.norm_ratio:.3g}, on {self.tokens:,} tokens",
            f"  EV {_number(self.ev_with_sinks)} with BOS, first positions and norm outliers counted",
            *(f"  {c.mistake:{width}}  EV {_number(c.ev):>8}  L0 {c.l0:6.4g}  {c.change}" for c in shown),
        ]


def diagnose(coder: SparseCoder, lm: LanguageModel | str, tokens: int = 2048, text: str | None = None) -> Report:
    """Returns whether a coder fits the activations of a model, and which usual mistake explains it if it does not.

    The model is a loaded one or its name. The text is that of a source as in `TextConfig.source`: a file, a folder or a
    hub id; by default the Python documentation on this machine. Healthy is an EV of at least 0.2, an L0 within a factor
    of two of the advertised one where there is one, and no single change with a score better by 0.05. Two changes at a
    time are tried where no single one is well.

    Raises ConfigError for a coder of no known site, of two models, or that needs gradients; and if a site is missing or
    of another width.
    """
    lm = load_language_model(lm, device=str(coder.W_enc.device)) if isinstance(lm, str) else lm
    coder = rebuilt(coder, _resolved(coder.spec, lm))
    subject = observe(lm, coder.spec, rows_of_text(lm, coder.spec, tokens, text))
    own = _measured("", coder, coder, subject)
    single = list(_suspects(lm.model, coder, subject))
    candidates = _merged([own, *(_measured(name, coder, other, subject) for name, other in single)])
    if not any(_well(candidate, subject.l0) for candidate in candidates):
        order = [*PLACES, *MAPS]
        pairs = (
            _measured(f"{first} + {second}", coder, both, subject)
            for first, other in single
            for second, both in _suspects(lm.model, other, subject)
            if order.index(second) > order.index(first)
        )
        candidates = _merged([*candidates, *pairs])
    return _report(own, candidates[1:], coder, subject)


def rows_of_text(
    lm: LanguageModel, spec: CoderSpec, tokens: int, text: str | None = None
) -> Int[Tensor, "rows context"]:
    """Returns about `tokens` tokens of text as rows with the coder's BOS policy, no document longer than a row."""
    most = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or CONTEXT
    context = min(spec.context_length or CONTEXT, CONTEXT, most)
    packer = Packer(context, "packed", spec.bos, lm.tokenizer)
    wanted, got = -(-tokens // context) * context, 0
    for number, (_, document) in enumerate(documents(TextConfig(source=text or "quickstart"))):
        (ids,) = encode(lm.tokenizer, [document[: context * CHARS_PER_TOKEN]])
        got += packer.add(ids[:context], number)
        if got >= wanted:
            break
    packer.finish(pad=True)
    if not packer.n_ready:
        raise ConfigError(f"text: {text} holds no text")
    return packer.take(-(-tokens // context))["tokens"]


def observe(lm: LanguageModel, spec: CoderSpec, tokens: Int[Tensor, "rows context"]) -> Subject:
    """Returns what the model computes of some rows at a coder's sites and at those of all mistakes of place."""
    own = list({site.name: site for site in (*spec.reads, *spec.writes)}.values())
    there = widths(lm, own)
    for sites, width in ((spec.reads, spec.d_in), (spec.writes, spec.d_out)):
        found = sum(there[site.name] for site in sites)
        if found != width:
            names = ", ".join(site.name for site in sites)
            raise ConfigError(f"site: the coder takes {names} to have width {width}; in {lm.name} it has {found}")
    sites = {site.name: site for site in own}
    for site in _sites(lm.model, spec):
        if site.name not in sites:
            with contextlib.suppress(ConfigError):  # no tensor, or it never runs
                there |= widths(lm, [site])
                sites[site.name] = site
    parts = [capture(lm, list(sites.values()), rows) for rows in tokens.split(ROWS)]
    real = tokens != PADDING
    activations = {name: torch.cat([part[name] for part in parts])[real.to(lm.device)].float() for name in sites}
    special = spec.mask.special_ids or tuple(sorted(special_ids(lm.tokenizer)))
    mask = MaskSpec(special, max(1, spec.mask.skip_positions))
    usual = token_mask(tokens, mask)[real].to(lm.device)
    if not usual.any():
        raise ConfigError("text: every token is masked (special tokens and skipped positions)")
    medians = {name: float(x[usual].norm(dim=1).median()) for name, x in activations.items()}
    usual &= norm_mask(activations, MaskSpec(norm_limits={name: NORM_FILTER * m for name, m in medians.items()}))
    return Subject(activations, usual, advertised_l0(spec))


def advertised_l0(spec: CoderSpec) -> float | None:
    """Returns the L0 that a coder is said to have: released with it, measured after training, or its budget k."""
    for name in ("advertised", "reconstruction"):
        l0 = spec.metrics.get(name, {}).get("l0")
        if l0:
            return float(l0)
    return float(spec.selection.k * spec.n_blocks) if isinstance(spec.selection, Budget) else None


def _resolved(spec: CoderSpec, lm: LanguageModel) -> CoderSpec:
    """Returns the spec with module paths in place of TransformerLens names."""
    if not spec.reads or not spec.writes:
        raise ConfigError("site: the coder's spec names no site to read; say it when loading: site=...")
    if any(site.tag for site in (*spec.reads, *spec.writes)):
        raise ConfigError("coder: it reads two models; the doctor knows one")
    if getattr(spec.selection, "inference", "plain") == "gradient":
        raise ConfigError("selection.inference: 'gradient' needs gradients; the doctor looks at activations: set plain")

    def found(site: Site) -> Site:
        (one,) = resolve(lm.model, [site.name], field="site")
        return replace(site, hook=one.hook, side=one.side)

    return spec.with_(reads=tuple(map(found, spec.reads)), writes=tuple(map(found, spec.writes)))


def _sites(model: nn.Module, spec: CoderSpec) -> Iterator[Site]:
    """Yields the sites that up to two mistakes of place come to."""
    once = [other for make in PLACES.values() for other in make(model, spec)]
    twice = [other for first in once for make in PLACES.values() for other in make(model, first)]
    for other in (*once, *twice):
        yield from (*other.reads, *other.writes)


def _suspects(model: nn.Module, coder: SparseCoder, subject: Subject) -> Iterator[tuple[str, SparseCoder]]:
    """Yields (mistake, the coder without it) for every usual mistake."""
    for name, places in PLACES.items():
        yield from ((name, rebuilt(coder, spec)) for spec in places(model, coder.spec) if subject.has(spec))
    for name, maps in MAPS.items():
        yield from ((name, other) for other in maps(coder, subject))


def _measured(mistake: str, before: SparseCoder, coder: SparseCoder, subject: Subject) -> Candidate:
    found = _figures(coder, subject)
    score = _score(found, subject.l0)
    return Candidate(mistake, _change(before, coder), found["ev"], found["l0"], score, coder)


@torch.no_grad()
def _figures(coder: SparseCoder, subject: Subject, every: bool = False) -> dict[str, Any]:
    x, target = (subject.columns(sites, every).to(coder.W_enc.device) for sites in (coder.spec.reads, coder.spec.writes))
    total = Reconstruction(coder.spec.d_sae)
    for part, wanted in zip(x.split(PART), target.split(PART), strict=True):
        total.update(wanted, *coder(part))
    return total.result()


def _score(found: dict[str, Any], advertised: float | None) -> float:
    fvu, l0 = found["fvu"], max(found["l0"], LEAST_L0)
    if fvu is None or not math.isfinite(fvu):
        return math.inf
    distance = abs(math.log(l0 / advertised)) if advertised else PRICE * math.log(l0)
    return math.log(max(fvu, LEAST_FVU)) + distance


def _merged(candidates: list[Candidate]) -> list[Candidate]:
    """Returns the candidates, each coder once: what comes to the same is one, under all names and the shortest change.

    The block before a layer and the input of that layer are one tensor, for example.
    """
    found: dict[tuple[Any, ...], Candidate] = {}
    for new in candidates:
        key = (new.l0, f"{new.score:.9g}")
        old = found.setdefault(key, new)
        if new.mistake not in old.mistake and old.mistake:
            change = min(old.change, new.change, key=len)
            found[key] = replace(old, mistake=f"{old.mistake} or {new.mistake}", change=change)
    return list(found.values())


def _well(candidate: Candidate, advertised: float | None) -> bool:
    near = advertised is None or abs(math.log(max(candidate.l0, LEAST_L0) / advertised)) <= math.log(MOST_L0_FACTOR)
    return candidate.ev is not None and candidate.ev >= LEAST_EV and near


def _report(own: Candidate, candidates: list[Candidate], coder: SparseCoder, subject: Subject) -> Report:
    candidates = sorted(candidates, key=lambda c: c.score)
    usual, every = _figures(coder, subject), _figures(coder, subject, every=True)
    best = candidates[0] if candidates and candidates[0].score < own.score - MARGIN else own
    well = _well(own, subject.l0)
    healthy = best is own and well
    if healthy:
        verdict = f"healthy: EV {_number(own.ev)}, L0 {own.l0:.4g}"
    elif best is own:
        verdict = f"unwell: EV {_number(own.ev)}, L0 {own.l0:.4g}; none of the usual mistakes explains it"
    else:
        doubt = "" if _well(best, subject.l0) else ", which is still not well"
        verdict = (
            f"{best.mistake}: {best.change} gives EV {_number(best.ev)}, L0 {best.l0:.4g}{doubt}; "
            f"as it is EV {_number(own.ev)}, L0 {own.l0:.4g}"
        )
    return Report(
        tokens=usual["tokens"],
        l0=own.l0,
        advertised_l0=subject.l0,
        ev=own.ev,
        ev_with_sinks=every["ev"],
        cosine=usual["cosine"],
        norm_ratio=usual["norm_ratio"],
        score=own.score,
        healthy=healthy,
        verdict=verdict,
        candidates=candidates,
    )


def _change(before: SparseCoder, after: SparseCoder) -> str:
    """Returns what tells one coder from another, as what to say when loading or to set in the spec."""
    old, new, parts = before.spec, after.spec, []
    if _place(old) != _place(new):
        parts.append(f'site="{_place(new)}" instead of "{_place(old)}"')
    if (old.normalization, _scales(old)) != (new.normalization, _scales(new)):
        parts.append(f"{_normalization(new)} instead of {_normalization(old)}")
    if old.pre_bias != new.pre_bias:
        parts.append(f'pre_bias="{new.pre_bias}" instead of "{old.pre_bias}"')
    if old.selection != new.selection:
        parts.append(f"selection {_selection(after)} instead of {_selection(before)}")
    return ", ".join(parts)


def _place(spec: CoderSpec) -> str:
    reads, writes = (",".join(site.name for site in sites) for sites in (spec.reads, spec.writes))
    return reads if reads == writes else f"{reads}->{writes}"


def _scales(spec: CoderSpec) -> list[float]:
    return [spec.normalization.scale * site.scale for site in (*spec.reads, *spec.writes)]


def _normalization(spec: CoderSpec) -> str:
    if spec.normalization.kind != "scalar":
        return f"normalization {spec.normalization.kind}"
    return "scale=" + ",".join(dict.fromkeys(f"{scale:.4g}" for scale in _scales(spec)))


def _selection(coder: SparseCoder) -> str:
    rule = coder.spec.selection
    name = Selection.get_choice_name(type(rule))
    if isinstance(rule, Budget):
        return f"{name} (k={rule.k})"
    thresholds = getattr(coder, "threshold", None)
    one = thresholds is not None and bool((thresholds == thresholds[0]).all())
    return f"{name} (threshold={float(thresholds[0]):.4g})" if one else name


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
