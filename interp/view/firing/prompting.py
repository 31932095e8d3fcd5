"""A text through a model and a coder: which latents fire where, what they are called, and their direct effects."""

import logging
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from interp.evidence.effects import DirectEffects, Entries, Measured
from interp.evidence.paths import NoPath
from interp.evidence.promotes import token_text
from interp.run.latents import ids_among
from interp.run.rundir import coder_digest, digest_in, run_folder
from interp.view.explained import ExplainedRun
from interp.view.firing.prompted import ORDERS, Logits, PromptLatent, PromptRecord
from interp.view.firing.table import as_table, lines
from sae.base.arguments import whole, wrong
from sae.base.errors import ConfigError
from sae.base.visible import visible
from sae.coder.arguments import CoderLike, as_coder
from sae.coder.coder import SparseCoder
from sae.evaluation.activations import Activations, Reading, codes_of, reading
from sae.lm.hooks import capture
from sae.lm.models import ONE_AT_A_TIME, LanguageModel
from sae.text.given import as_document

if TYPE_CHECKING:
    from sae.lm.models import ModelLike

log = logging.getLogger(__name__)
MOVED = 5  # tokens that a latent raises or lowers most, as shown
_compared: WeakKeyDictionary[SparseCoder, set[Path]] = WeakKeyDictionary()
"""By coder, the runs whose weights were compared with its own: to look at all of them takes seconds."""


@dataclass(frozen=True, repr=False)
class PromptResult(PromptRecord):
    """Which latents of a coder fire in a text, and where. `print` shows a table, a notebook the text with the tokens
    shaded at which they do.
    """

    def __repr__(self) -> str:
        return self.title()

    def __str__(self) -> str:
        return "\n".join(lines(self, self.top()))

    def _repr_html_(self) -> str:
        return as_table(self, self.top())


def prompt(
    coder: CoderLike,
    lm: "ModelLike | None",
    text: Any,
    run: Any = None,
    top: int = 20,
    *,
    latents: Any = None,
    chat: bool = False,
    second: "ModelLike | None" = None,
) -> PromptResult:
    """Returns which latents of a coder fire in a text and where, what they are called, and what each adds, directly, to
    the logits of the token that follows.

        found = interp.prompt("runs/quickstart", "quickstart", "Return the number of", run="runs/quickstart")
        found.top(5), found.at(3), found.of(508), found.to_pandas()

    Values are those of `sae.activations`: under the full context, with what training puts around a text and masks. The
    effect of a latent at a token is what the logit of a next token, above the average over the vocabulary, loses when
    the latent is taken out there while later layers see nothing of it and scales of norms stand (before a softcap).

    Args:
        coder: a loaded one, or its address as of `sae.load`.
        lm: the language model, loaded or by name; None: the one that the coder names.
        text: one text, a chat (a list of messages with role and content), or token ids as they are.
        run: an explained run or its folder, whose labels are told.
        top: how many latents come first: those whose effects are told in full.
        latents: only these: ids as `interp.explain` takes them.
        chat: whether the text is a user's message, to be put into the model's chat template.
        second: the second model of a crosscoder of two.

    Raises ConfigError, ValueError or TypeError in one line for a coder of no known model or site, or that looks at
    gradients; for no text, one longer than the model was trained on, and latents that there are not.
    """
    top = whole("top", top)
    if isinstance(text, str) and not text:
        raise ConfigError("text: it is empty; give some, such as 'The cat sat on the mat'")
    if chat:
        text = [{"role": "user", "content": text}]
    text = as_document("text", text)
    coder = as_coder(coder)
    explained = _explained(run, coder)
    with ONE_AT_A_TIME:
        read = reading(lm, coder, text, second, as_trained=True)
        spec = read.coder.spec
        asked = None if latents is None else set(ids_among(range(spec.d_sae), latents, spec.d_sae))
        found, measured, why = _measured(read)
        entries = _counting(found, asked)
        plain = [piece or "" for piece in found.strings[0]]
        tokens, own = found.tokens[0], read.models[""]
        after = torch.cat([tokens[1:], tokens.new_zeros(1)])
        follows: list[str | None] = [*plain[1:], None]
        logits: list[float | None] = [None] * len(plain)
        effects: list[float] | None = None
        if measured is not None:
            after[-1] = measured.direct.likeliest
            follows[-1] = token_text(own.tokenizer, int(after[-1]))
            logits = list(measured.logits(after).tolist())
            effects = measured.on(entries, after[entries.tokens]).tolist()
        fired = _latents(entries, effects, _labels(explained, set(entries.ids.tolist())))
        if measured is not None:
            fired = _with_moved(fired, measured, own, top)
    return PromptResult(
        model=visible(own.name),
        site=", ".join(site.name for site in spec.reads),
        d_sae=spec.d_sae,
        tokens=tuple(map(visible, plain)),
        token_ids=tuple(tokens.tolist()),
        mask=tuple(found.mask[0].tolist()),
        follows=tuple(None if piece is None else visible(piece) for piece in follows),
        logits=tuple(logits),
        no_effects=why,
        latents=tuple(fired),
        shown=top,
    )


def _explained(run: Any, coder: SparseCoder) -> ExplainedRun | None:
    """Returns the explained run that is meant, by its folder or itself; ConfigError for one of other latents.
    That weights differ is said once.
    """
    if run is None:
        return None
    if isinstance(run, str | Path):
        run = ExplainedRun(run_folder(Path(run)))
    if not isinstance(run, ExplainedRun):
        raise wrong("run", run, "an explained run or its folder")
    d_sae, seen = coder.spec.d_sae, _compared.setdefault(coder, set())
    if (run.d_sae or d_sae) != d_sae:
        raise ConfigError(f"run: {run.run_dir} is of a coder of {run.d_sae:,} latents; this one has {d_sae:,}")
    if run.run_dir not in seen:
        seen.add(run.run_dir)
        if digest_in(run.run_dir) not in ("", coder_digest(coder)):
            log.warning("run: %s is of a coder with other weights; its labels may not fit these latents", run.run_dir)
    return run


def _measured(read: Reading) -> tuple[Activations, Measured | None, str]:
    """Returns the codes of a text and, in the same pass of the model, the effects of what fires, or why there are none.

    What the codes are does not depend on whether effects are to be had.
    """
    coder, models, rows = read
    try:
        direct = DirectEffects(models[""], coder)
    except NoPath as reason:
        return codes_of(coder, models, rows), None, str(reason)

    def run(model: LanguageModel, sites: list[Any], batch: Tensor) -> dict[str, Tensor]:
        return direct.run(model, sites, batch) if model is models[""] else capture(model, sites, batch)

    found = codes_of(coder, models, rows, run)
    try:
        return found, direct.measured(), ""
    except NoPath as reason:
        return found, None, str(reason)


def _counting(found: Activations, asked: set[int] | None) -> Entries:
    """Returns what fires at tokens that count, of some latents only if these are asked for."""
    z = found.latents
    kept = found.mask.flatten()[z.tokens] & (z.values != 0)
    if asked is not None:
        kept &= torch.isin(z.ids, torch.tensor(sorted(asked)))
    return Entries(z.tokens[kept], z.ids[kept], z.values[kept].float())


def _labels(run: ExplainedRun | None, fired: Collection[int]) -> dict[int, str]:
    """Returns what an explained run calls latents, of those that it has a text for."""
    if run is None:
        return {}
    return {latent: visible(text) for latent, text in run.texts(fired).items()}


def _latents(entries: Entries, effects: list[float] | None, labels: dict[int, str]) -> list[PromptLatent]:
    """Returns every latent that fires, the largest value first."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, latent in enumerate(entries.ids.tolist()):
        places[latent].append(place)
    positions, values = entries.tokens.tolist(), entries.values.tolist()
    found = [
        PromptLatent(
            latent,
            labels.get(latent),
            tuple(positions[place] for place in some),
            tuple(values[place] for place in some),
            None if effects is None else tuple(effects[place] for place in some),
        )
        for latent, some in sorted(places.items())
    ]
    return sorted(found, key=lambda one: -abs(one.value))


def _with_moved(fired: list[PromptLatent], measured: Measured, lm: LanguageModel, top: int) -> list[PromptLatent]:
    """Returns latents, with the tokens that they move most where they fire most of those that come first."""
    first = {one.latent for key in ORDERS.values() for one in sorted(fired, key=key, reverse=True)[:top]}
    chosen = [one for one in fired if one.latent in first]
    if not chosen:
        return fired
    positions, ids, values = zip(*((one.position, one.latent, one.value) for one in chosen), strict=True)
    at = Entries(torch.tensor(positions), torch.tensor(ids), torch.tensor(values))
    sides = measured.extremes(at, MOVED)
    texts = {n: visible(token_text(lm.tokenizer, n)) for side in sides for n in set(side.ids.flatten().tolist())}
    told = [
        [_pairs(texts, *row) for row in zip(side.ids.tolist(), side.values.tolist(), strict=True)] for side in sides
    ]
    moved = {one.latent: pair for one, *pair in zip(chosen, *told, strict=True)}
    sided = {latent: dict(zip(("raised", "lowered"), pair, strict=True)) for latent, pair in moved.items()}
    return [replace(one, **sided.get(one.latent, {})) for one in fired]


def _pairs(texts: dict[int, str], tokens: list[int], logits: list[float]) -> Logits:
    return tuple((texts[token], logit) for token, logit in zip(tokens, logits, strict=True))
