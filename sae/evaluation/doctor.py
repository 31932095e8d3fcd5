"""The doctor: does a coder fit the activations that it is given, and if it does not, which usual mistake explains it?

About two thousand tokens go through the language model once, which captures the sites of all candidates: every usual
mistake of loading (`alternatives.py`) turned into the coder that was meant. All are measured on the same tokens and
ranked by

    score = ln error + max(0, |ln(L0 / L0*)| - ln 3) + 0.05 for every change made        lower is better

The error is E|x - out|^2 over that of a coder whose output is always the mean of what it should be. That is the FVU,
unless a normalization is undone per token: what it hands through around the coder is no merit of the coder. L0* is the
advertised L0; where there is none, the second term is left out. On other text an L0 may differ by a factor of two (a
ReLU coder's did from the chapters of Python's documentation to its docstrings); what goes beyond three counts as much
as an error that is larger by that factor. So a change is believed if it lowers the error by five percent or brings the
L0 back, and a second one if it does so again.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sae.base.arguments import whole, wrong
from sae.base.errors import ConfigError
from sae.base.sums import in_float64
from sae.coder.arguments import as_coder
from sae.coder.coder import SparseCoder
from sae.coder.normalization import undo
from sae.coder.spec import CoderSpec
from sae.evaluation.alternatives import MAPS, PLACES, Observed, rebuilt
from sae.evaluation.metrics import Reconstruction
from sae.lm.hooks import capture, site_widths
from sae.lm.masking import MaskSpec, norm_mask, token_mask
from sae.lm.models import LanguageModel, as_language_model
from sae.lm.site import Site
from sae.lm.sites import resolve_sites
from sae.selection import Selection
from sae.text.documents import Document, TextConfig, documents
from sae.text.packing import PADDING, Packer
from sae.text.tokenizing import CHARS_PER_TOKEN, encode_texts, special_ids

if TYPE_CHECKING:
    from sae.coder.arguments import CoderLike
    from sae.lm.models import ModelLike

LEAST_EV = 0.2
PRICE = 0.05
MOST_TIMES = 3.0  # that an L0 may be off
NORM_FILTER = 10.0  # times the median norm, as in training
CONTEXT = 256  # rows are no longer: many short ones show more of the text
ROWS, PART = 8, 1024  # rows in one pass of the model, tokens in one of the coder
SHOWN = 6
BOTH = " + "
MISTAKES = [*PLACES, *MAPS]
LEAST_L0, LEAST_FVU = 0.01, 1e-9  # so that logarithms exist


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
        best = {c.mistake: c for c in reversed(self.candidates)}  # of each mistake, what is ranked first
        shown = sorted(best.values(), key=_score)[:SHOWN]
        width = max([len(c.mistake) for c in shown], default=0)
        return [
            self.verdict,
            f"  L0 {self.l0:.4g}{advertised}, EV {_number(self.ev)}, cosine {self.cosine:.3f}, "
            f"norm ratio {self.norm_ratio:.3g}, on {self.tokens:,} tokens",
            f"  EV {_number(self.ev_with_sinks)} with BOS, first positions and norm outliers counted",
            *(f"  {c.mistake:{width}}  EV {_number(c.ev):>8}  L0 {c.l0:6.4g}  {c.change}" for c in shown),
        ]


def diagnose(
    coder: "CoderLike", lm: "ModelLike", tokens: int = 2048, text: "str | os.PathLike[str] | None" = None
) -> Report:
    """Returns whether a coder fits the activations of a model, and which usual mistake explains it if it does not.

    The coder is one or its address as of `sae.load`, the model a loaded one or its name. The text is that of a source
    as in `TextConfig.source`: a file, a folder or a hub id; by default the Python documentation on this machine.
    Healthy is an EV of at least 0.2, an L0 within a factor of three of the advertised one where there is one, and no
    change with a better score. A second change is tried on top of a change that helps, and every pair where no single
    one makes the coder well.

    Raises ConfigError for a coder of no known site, of two models, or that needs gradients; and if a site is missing or
    of another width.
    """
    coder, tokens = as_coder(coder), whole("tokens", tokens)
    if not isinstance(text, str | os.PathLike | None):
        raise wrong("text", text, "the name of a source: a file, a folder or a hub id")
    text = None if text is None else os.fspath(text)
    lm = as_language_model(lm, device=str(coder.device))
    coder = rebuilt(coder, _resolved(coder.spec, lm))
    observed = observe(lm, coder.spec, rows_of_text(lm, coder.spec, tokens, text))

    def undone(of: Candidate, later: bool = False) -> Iterator[Candidate]:
        known = [number for number, mistake in enumerate(MISTAKES) if mistake in of.mistake]
        for mistake, fixed in _suspects(lm.model, of.coder, observed, MISTAKES[max(known) :] if later else MISTAKES):
            if mistake not in of.mistake:
                name = f"{of.mistake}{BOTH}{mistake}" if of.mistake else mistake
                yield _candidate(name, _change(coder, fixed), fixed, _figures(fixed, observed), observed.l0)

    usual = _figures(coder, observed)
    own = _candidate("", "", coder, usual, observed.l0)
    candidates = _distinct([own, *undone(own)])
    best = min(candidates, key=_score)
    pairs = []
    if not _well(best, observed.l0):
        pairs = [pair for one in candidates[1:] for pair in undone(one, later=True)]
    elif best is not own:  # there may be a second mistake
        pairs = list(undone(best))
    candidates += [pair for pair in pairs if pair.score < best.score]
    candidates = sorted(_distinct(candidates), key=_score)
    return _report(own, candidates, usual, _figures(coder, observed, every=True), observed.l0)


def rows_of_text(
    lm: LanguageModel, spec: CoderSpec, tokens: int, text: str | None = None
) -> Int[Tensor, "rows context"]:
    """Returns about `tokens` tokens of text as rows with the coder's BOS policy, no document longer than a row."""
    return rows_of_documents(lm, spec, tokens, documents(TextConfig(source=text or "quickstart")), str(text))


def rows_of_documents(
    lm: LanguageModel, spec: CoderSpec, tokens: int, given: Iterable[tuple[str, Document]], name: str
) -> Int[Tensor, "rows context"]:
    """As `rows_of_text`, of documents and the name of what they are of."""
    said = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or CONTEXT
    most = min(said, lm.positions or said)
    context = min(spec.context_length or CONTEXT, CONTEXT, most)
    packer = Packer(context, "packed", spec.bos, lm.tokenizer)
    wanted, got = -(-tokens // context) * context, 0
    for number, (_, document) in enumerate(given):
        (ids,) = encode_texts(lm.tokenizer, [document[: context * CHARS_PER_TOKEN]])
        got += packer.add(ids[:context], number)
        if got >= wanted:
            break
    packer.finish(pad=True)
    if not packer.n_ready:
        raise ConfigError(f"text: {name} holds no text")
    return packer.take(-(-tokens // context))["tokens"]


def check_widths(lm: LanguageModel, there: dict[str, int], sites: Sequence[Site], width: int) -> None:
    """Raises ConfigError unless sites, of the widths that are `there` by name, have a coder's width together."""
    found = sum(there[site.name] for site in sites)
    if found != width:
        names = ", ".join(site.name for site in sites)
        raise ConfigError(f"site: the coder takes {names} to have width {width}; in {lm.name} it has {found}")


def observe(lm: LanguageModel, spec: CoderSpec, tokens: Int[Tensor, "rows context"]) -> Observed:
    """Returns what the model computes of some rows at a coder's sites and at those of all mistakes of place."""
    own = list({site.name: site for site in (*spec.reads, *spec.writes)}.values())
    there = site_widths(lm, own)
    check_widths(lm, there, spec.reads, spec.d_in)
    check_widths(lm, there, spec.writes, spec.d_out)
    sites = {site.name: site for site in own}
    for site in _sites(lm.model, spec):
        if site.name not in sites:
            with contextlib.suppress(ConfigError):  # no tensor, or it never runs
                there |= site_widths(lm, [site])
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
    return Observed(activations, usual, advertised_l0(spec))


def advertised_l0(spec: CoderSpec) -> float | None:
    """Returns the L0 that a coder is said to have: released with it, measured after training, or its budget k."""
    for name in ("advertised", "reconstruction"):
        l0 = spec.metrics.get(name, {}).get("l0")
        if l0:
            return float(l0)
    implied = spec.selection.implied_l0
    return None if implied is None else float(implied * spec.n_blocks)


def _resolved(spec: CoderSpec, lm: LanguageModel) -> CoderSpec:
    """Returns the spec with module paths in place of TransformerLens names."""
    if not spec.is_placed:
        raise ConfigError("site: the coder's spec names no site to read; say it when loading: site=...")
    if any(site.tag for site in (*spec.reads, *spec.writes)):
        raise ConfigError("coder: it reads two models; the doctor knows one")
    if spec.selection.looks_at_gradients:
        raise ConfigError("selection.inference: 'gradient' needs gradients; the doctor looks at activations: set plain")

    def found(site: Site) -> Site:
        (one,) = resolve_sites(lm.model, [site.name], field="site")
        return replace(site, hook=one.hook, side=one.side)

    return spec.with_(reads=tuple(map(found, spec.reads)), writes=tuple(map(found, spec.writes)))


def _sites(model: nn.Module, spec: CoderSpec) -> Iterator[Site]:
    """Yields the sites that up to two mistakes of place come to."""
    once = [other for make in PLACES.values() for other in make(model, spec)]
    twice = [other for first in once for make in PLACES.values() for other in make(model, first)]
    for other in (*once, *twice):
        yield from (*other.reads, *other.writes)


def _suspects(
    model: nn.Module, coder: SparseCoder, observed: Observed, mistakes: list[str]
) -> Iterator[tuple[str, SparseCoder]]:
    """Yields (mistake, the coder without it) for each of some usual mistakes."""
    for name in mistakes:
        if name in PLACES:
            specs = PLACES[name](model, coder.spec)
            yield from ((name, rebuilt(coder, spec)) for spec in specs if observed.has(spec))
        else:
            yield from ((name, other) for other in MAPS[name](coder, observed))


@torch.no_grad()
def _figures(coder: SparseCoder, observed: Observed, every: bool = False) -> dict[str, Any]:
    """Returns the metrics of reconstruction, and `error` as at the head of this module."""
    spec = coder.spec
    x, target = (observed.columns(sites, every).to(coder.device) for sites in (spec.reads, spec.writes))
    found = Reconstruction(spec.d_sae, spec.d_out)
    for part, wanted in zip(x.split(PART), target.split(PART), strict=True):
        found.update(wanted, *coder(part))
    result = found.result()
    if not spec.normalization.per_token:
        return result | {"error": result["fvu"]}
    constant = undo(spec.normalize_target(target).mean(0).expand_as(target), spec.normalize(x)[1])
    left = float(in_float64(target - constant).square().sum(1).mean())
    return result | {"error": result["mse"] / left if left else None}


def _candidate(
    mistake: str, change: str, coder: SparseCoder, found: dict[str, Any], advertised: float | None
) -> Candidate:
    """Returns a candidate with its score, as at the head of this module."""
    error, changes = found["error"], len(mistake.split(BOTH)) if mistake else 0
    nats = math.inf if error is None or not math.isfinite(error) else math.log(max(error, LEAST_FVU))
    score = nats + _beyond(found["l0"], advertised) + PRICE * changes
    return Candidate(mistake, change, found["ev"], found["l0"], score, coder)


def _beyond(l0: float, advertised: float | None) -> float:
    """Returns how far an L0 is from the advertised one, beyond a factor of three, in nats."""
    if advertised is None:
        return 0.0
    return max(0.0, abs(math.log(max(l0, LEAST_L0) / advertised)) - math.log(MOST_TIMES))


def _score(candidate: Candidate) -> float:
    return candidate.score


def _well(candidate: Candidate, advertised: float | None) -> bool:
    return candidate.ev is not None and candidate.ev >= LEAST_EV and not _beyond(candidate.l0, advertised)


def _distinct(candidates: list[Candidate]) -> list[Candidate]:
    """Returns each coder once: single changes that come to the same are one, under all names and the shortest change.

    The output of a layer and the input of the next are one tensor, for example.
    """
    found: dict[tuple[Any, ...], Candidate] = {}
    for new in candidates:
        key = (new.l0, None if new.ev is None else f"{new.ev:.9g}")
        old = found.setdefault(key, new)
        if old.mistake and BOTH not in new.mistake and new.mistake not in old.mistake:
            change = min(old.change, new.change, key=len)
            found[key] = replace(old, mistake=f"{old.mistake} or {new.mistake}", change=change)
    return list(found.values())


def _report(
    own: Candidate, ranked: list[Candidate], usual: dict[str, Any], every: dict[str, Any], advertised: float | None
) -> Report:
    best, now = ranked[0], f"EV {_number(own.ev)}, L0 {own.l0:.4g}"
    healthy = best is own and _well(own, advertised)
    found = f"{best.mistake}: {best.change} gives EV {_number(best.ev)}, L0 {best.l0:.4g}"
    if healthy:
        verdict = f"healthy: {now}"
    elif best is not own and _well(best, advertised):
        verdict = f"{found}; as it is {now}"
    else:
        nearest = f" (nearest: {found})" if best is not own else ""
        verdict = f"unwell: {now}; none of the usual mistakes explains it{nearest}"
    return Report(
        tokens=usual["tokens"],
        l0=own.l0,
        advertised_l0=advertised,
        ev=own.ev,
        ev_with_sinks=every["ev"],
        cosine=usual["cosine"],
        norm_ratio=usual["norm_ratio"],
        score=own.score,
        healthy=healthy,
        verdict=verdict,
        candidates=[candidate for candidate in ranked if candidate is not own],
    )


def _change(before: SparseCoder, after: SparseCoder) -> str:
    """Returns what is new in a coder, as what to say when loading it or to set in its spec."""
    old, new, parts = before.spec, after.spec, []
    if _place(old) != _place(new):
        parts.append(f'site="{_place(new)}"')
    if (old.normalization, _scales(old)) != (new.normalization, _scales(new)):
        parts.append(_normalization(new))
    if old.pre_bias != new.pre_bias:
        parts.append(f'pre_bias="{new.pre_bias}"')
    if old.selection != new.selection:
        parts.append(f"selection {_selection(after)}")
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
    if rule.implied_l0 is not None:
        return f"{name} (k={rule.implied_l0})"
    thresholds = coder.per_latent().get("threshold", torch.zeros(0))
    return f"{name} (threshold={float(thresholds[0]):.4g})" if thresholds.unique().numel() == 1 else name


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
