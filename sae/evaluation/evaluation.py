"""Held-out evaluation: how well a coder reconstructs, and what the language model loses when it is spliced in.

Pass 1 stops the model at the last site and gathers reconstruction metrics and the mean activation. Pass 2 runs the
whole model clean, spliced, zero-ablated and mean-ablated. The same mask holds in every arm: masked positions are
neither replaced nor counted. Losses are averaged over tokens first; ratios are formed once, at the end.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base.arguments import whole
from sae.base.errors import ConfigError
from sae.base.progress import Display, Watch
from sae.base.settings import decode
from sae.base.sums import in_float64
from sae.coder.arguments import as_coders
from sae.coder.coder import SparseCoder
from sae.coder.spec import RELEASED, CoderSpec
from sae.coder.splicing import reads_ahead, splice
from sae.evaluation.figures import (
    Figures,
    both_modes,
    evaluate_stored,
    fold_modes,
    held_out_of,
    results_of,
    side_by_side,
    without_overflow,
)
from sae.evaluation.metrics import kl_divergence, loss_recovered
from sae.evaluation.models import models_of
from sae.evaluation.sharing import Sharing
from sae.evaluation.tables import Evaluation
from sae.lm.files import loading_bars
from sae.lm.hooks import (
    capture,
    capture_with_gradients,
    hooked,
    model_inputs,
    next_token_losses,
    sites_of_model,
)
from sae.lm.intervene import ablate
from sae.lm.masking import next_token_mask, norm_mask, token_mask
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.parallel.ranks import ALONE, Share
from sae.stream.tensors import TensorSource
from sae.text.documents import TextConfig
from sae.text.tokenizing import TokenRows, as_rows, special_ids, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sae.coder.arguments import CoderLike
    from sae.lm.models import ModelLike

log = logging.getLogger(__name__)
PASS_LOGITS = 2**25  # most logits held at once, per copy: 128 MiB
ARMS = ("spliced", "zero", "mean")
SUMMED = ("tokens", "clean", *ARMS, *(f"kl_{arm}" for arm in ARMS))


def evaluate(
    coders: "CoderLike | Mapping[str, CoderLike]",
    lm: "ModelLike | None" = None,
    rows: "TokenRows | Tensor | None" = None,
    tokens: int = 16_384,
    nulls: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    second: "ModelLike | None" = None,
    *,
    activations: Any = None,
    progress: Display = True,
) -> Evaluation:
    """Returns the metrics of a coder on about `tokens` held-out tokens; of several coders, a dict by name.

    A coder may be an address as of `sae.load`, the model a name or loaded, and rows a tensor of token ids.
    Rows are taken evenly from the whole held-out part: the first ones may all come from one long document.
    The model, the `second` model of a crosscoder of two, and the held-out rows default to those the (first) coder's
    spec names: where it was trained. `activations` take their place: a path as in `activations.path`, tensors by site,
    or one tensor [n, width]; no model is loaded then, and all that needs one is absent. Of those that the coder was
    trained on, the part is measured that was held out.
    Keys: `reconstruction` (with the norm filter) and `reconstruction_unfiltered`, `density`, `loss` (CE and KL of every
    arm; absent for a model that predicts no next token, and for what can be read but not replaced), `nulls` on request.
    Where they apply: `fvu_by_site` of several sites written, `skip` (what the skip path alone explains), `heads`
    (decoder shares of attention heads), `against` (autoencoders of the same sites in this evaluation), and
    `with_gradients`, labeled: all figures again, with
    gradients at inference. Units: nats per token. `progress` is a `Display`: True, False or a function. Of several
    ranks, whichever calls it measures all by itself.
    """
    several, watch, tokens = as_coders(coders), Watch(should_stop, display=progress), whole("tokens", tokens)
    found = evaluate_all(several, watch, tokens, nulls, lm=lm, rows=rows, second=second, activations=activations)
    return Evaluation(found if isinstance(coders, Mapping) else found[""])


def evaluate_all(
    coders: dict[str, SparseCoder],
    watch: Watch,
    tokens: int,
    nulls: bool = False,
    share: Share = ALONE,
    *,
    lm: "ModelLike | None" = None,
    rows: "TokenRows | Tensor | None" = None,
    second: "ModelLike | None" = None,
    activations: Any = None,
) -> dict[str, Any]:
    """Returns the metrics of coders by name, as `evaluate` does.

    With a share of several, all ranks must call it alike: each makes its part of the passes, and all return the same
    figures, those of one process to the rounding of float64. An error or a stop of one ends all. `nulls` are measured
    by the first rank, which needs all of the activations.
    """
    several, sharing = coders, Sharing(share)
    spec = next(iter(several.values())).spec
    if activations is not None:
        source = activations if isinstance(activations, TensorSource) else held_out_of(activations, several, tokens)
        return evaluate_stored(several, source, tokens, nulls, watch, sharing)
    with loading_bars(shown=watch.display is True):
        models = models_of(several, lm, second)
    lm = models[""]
    several = {name: with_special_tokens_masked(coder, lm.tokenizer) for name, coder in several.items()}
    given = None if rows is None else as_rows(rows)
    for model in models.values():
        model.check_context(given.context_length if given else text_of(spec).context_length)
    held_out = given or tokenize(text_of(spec), lm.tokenizer, lm.source(), watch).held_out
    modes = both_modes(several)
    batches = _spread(held_out, tokens, getattr(lm.model.config.get_text_config(), "vocab_size", 0))
    causal = {tag: _writing(modes, tag) for tag, model in models.items() if model.is_causal}
    log.info("evaluating on %s held-out tokens", f"{sum(int(token_mask(part, spec.mask).sum()) for part in batches):,}")
    own = share.of(len(batches))
    batches = batches[own.start : own.stop]
    passes = len(batches) * (1 + sum(map(len, causal.values())))
    with torch.no_grad(), watch.stage("evaluating", passes, "passes", visible=sharing.shows) as stage:

        def advance() -> None:
            stage.update(stage.n + 1)
            watch.poll("during evaluation")

        results, means = _reconstruct(modes, models, batches, nulls, advance, sharing)
        for tag, writing in causal.items():
            if writing:
                losses = _losses(writing, models, tag, batches, means, advance, sharing)
                for name, found in losses.items():
                    results[name]["loss" if not tag else f"loss_{tag}"] = found
    fold_modes(results, several)
    _compare(several, results)
    return {name: without_overflow(found) for name, found in results.items()}


def _compare(coders: dict[str, SparseCoder], results: dict[str, Any]) -> None:
    """Sets every transcoder beside the autoencoders of the sites that it writes: L0 and loss of both."""
    for name, coder in coders.items():
        if coder.spec.is_autoencoder or "loss" not in results[name]:
            continue
        ours = results[name]["loss"]["ce_spliced"]
        found: dict[str, Any] = {}
        for other, rival in coders.items():
            written = [site.name for site in rival.spec.writes]
            if rival.spec.is_autoencoder and written == [site.name for site in coder.spec.writes]:
                loss, l0 = results[other]["loss"], results[other]["reconstruction"]["l0"]
                theirs, added = loss["ce_spliced"], loss["ce_added"]
                ratio = ours / theirs if theirs else None
                found[other] = {"l0": l0, "ce_spliced": theirs, "ce_added": added, "ce_ratio": ratio}
        if found:
            results[name]["against"] = found


def with_special_tokens_masked(coder: SparseCoder, tokenizer: "PreTrainedTokenizerBase") -> SparseCoder:
    """Returns a coder of others, which does not say what it masked, with the special tokens of its model masked.

    A coder trained here says it, and comes back as it is; the tensors are shared.
    """
    if RELEASED not in coder.spec.training or coder.spec.mask.special_ids:
        return coder
    mask = replace(coder.spec.mask, special_ids=tuple(sorted(special_ids(tokenizer))))
    return coder.with_spec(coder.spec.with_(mask=mask))


def text_of(spec: CoderSpec) -> TextConfig:
    """Returns the text a coder was trained on, as its spec describes it."""
    if "text" not in spec.training:
        raise ConfigError("text: the coder's spec does not say what text it was trained on; pass rows")
    return decode(TextConfig, spec.training["text"], "text")


def _spread(rows: TokenRows, tokens: int, vocabulary: int) -> list[Int[Tensor, "_rows context"]]:
    """Returns about so many tokens in rows spread evenly over a text, a pass of the model each."""
    n_rows = min(rows.n_rows, max(1, -(-tokens // rows.context_length)))
    chosen = torch.arange(n_rows) * rows.n_rows // n_rows
    return [rows.tokens(part) for part in chosen.split(rows_per_pass(rows.context_length, vocabulary))]


def rows_per_pass(context_length: int, vocabulary: int) -> int:
    """Returns how many rows the evaluation runs at once."""
    return max(1, min(16, PASS_LOGITS // max(1, context_length * vocabulary)))


def _reconstruct(
    coders: dict[str, SparseCoder],
    models: dict[str, LanguageModel],
    batches: list[Int[Tensor, "_rows context"]],
    nulls: bool,
    advance: Callable[[], None],
    sharing: Sharing,
) -> tuple[dict[str, Any], dict[str, Float[Tensor, "_d"]]]:
    """Returns the metrics of pass 1 and the mean activation at the sites written, by coder."""
    figures = {name: Figures(coder, nulls) for name, coder in coders.items()}
    with sharing.measuring():
        for batch in batches:
            advance()
            seen = _seen(coders, models, batch)
            for found in figures.values():
                keep = token_mask(batch, found.coder.spec.mask).to(models[""].device)
                found.update(*({name: x[keep] for name, x in tensors.items()} for tensors in seen))
    results = results_of(figures, sharing)
    return results, {name: found.filtered.target.mean.float() for name, found in figures.items()}


def _seen(
    coders: dict[str, SparseCoder], models: dict[str, LanguageModel], batch: Int[Tensor, "rows context"]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns activations and, if a coder looks at them, gradients at all sites, of the models as they are."""
    asking = [coder.spec for coder in coders.values() if coder.spec.selection.looks_at_gradients]
    losses = {spec.selection.gradient_loss or "" for spec in asking}
    if len(losses) > 1:
        raise ConfigError("coders: they look at gradients of different losses; evaluate them one by one")
    seen: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for tag, lm in models.items():
        sites = sites_of_model(_sites(coders), tag)
        if not sites:
            continue
        if asking:
            (loss,) = losses
            found, slopes = capture_with_gradients(lm, sites, batch, asking[0].mask, loss)
            gradients |= {name: g.to(models[""].device) for name, g in slopes.items()}
        else:
            found = capture(lm, sites, batch)
        seen |= {name: x.to(models[""].device) for name, x in found.items()}
    return seen, gradients


def _writing(coders: dict[str, SparseCoder], tag: str) -> dict[str, SparseCoder]:
    """Returns the coders that write in one of the models what can be replaced there."""
    able = {name: c for name, c in coders.items() if all(site.side != "normalized" for site in c.spec.writes)}
    return {name: coder for name, coder in able.items() if sites_of_model(coder.spec.writes, tag)}


def _sites(coders: dict[str, SparseCoder]) -> list[Site]:
    """Returns all sites that the coders read or write, each once."""
    return list({site.name: site for c in coders.values() for site in (*c.spec.reads, *c.spec.writes)}.values())


def _losses(
    coders: dict[str, SparseCoder],
    models: dict[str, LanguageModel],
    tag: str,
    batches: list[Int[Tensor, "_rows context"]],
    means: dict[str, Float[Tensor, "_d"]],
    advance: Callable[[], None],
    sharing: Sharing,
) -> dict[str, dict[str, Any]]:
    """Returns the losses of one model with the sites replaced that each coder writes; all of them write in it."""
    sums = torch.zeros(len(coders), len(SUMMED), dtype=torch.float64)
    with sharing.measuring():
        for batch in batches:
            sums += _loss_sums(coders, models, tag, batch, means, advance)
    sharing.add_up([sums])
    return {name: _loss_table(*of) for name, of in zip(coders, sums.tolist(), strict=True)}


def _loss_sums(
    coders: dict[str, SparseCoder],
    models: dict[str, LanguageModel],
    tag: str,
    batch: Int[Tensor, "rows context"],
    means: dict[str, Float[Tensor, "_d"]],
    advance: Callable[[], None],
) -> Float[Tensor, "coders summed"]:
    """Returns what is `SUMMED` over the tokens of one batch, by coder."""
    lm, device = models[tag], models[""].device

    def logits(tokens: Tensor) -> Tensor:
        return lm.model(**model_inputs(lm, tokens)).logits

    tokens = batch.to(lm.device)
    seen: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    if len(models) > 1 or any(coder.spec.selection.looks_at_gradients for coder in coders.values()):
        seen, gradients = _seen(coders, models, batch)
    own = sites_of_model(_sites(coders), tag)
    with hooked(lm.model, own, lambda site, x: seen.update({site.name: x.to(device, copy=True)})):
        clean = logits(tokens)
    ablated: dict[Any, tuple[Tensor, Tensor]] = {}  # the same for all coders of the same sites and mask
    sums = []
    for name, coder in coders.items():
        advance()
        spec = coder.spec
        keep = token_mask(tokens, spec.mask) & norm_mask(seen, spec.mask).to(lm.device)
        g = side_by_side(gradients, spec.writes) if spec.selection.looks_at_gradients else None
        arms: dict[str, Any] = {
            "spliced": splice(lm.model, coder, keep, False, seen if reads_ahead(spec) else None, g, tag),
            "zero": ablate(lm.model, spec.writes, keep, tag=tag),
            "mean": ablate(lm.model, spec.writes, keep, means[name], tag),
        }
        clean_losses = next_token_losses(clean, tokens, keep)
        total = {"tokens": float(len(clean_losses)), "clean": float(in_float64(clean_losses).sum())}
        for arm, change in arms.items():
            key = (name if arm == "spliced" else arm, tuple(site.name for site in spec.writes), str(spec.mask))
            if key not in ablated:
                with change:
                    patched = logits(tokens)
                kl = kl_divergence(clean, patched, next_token_mask(tokens, keep))
                ablated[key] = next_token_losses(patched, tokens, keep), kl
            for label, found in zip((arm, f"kl_{arm}"), ablated[key], strict=True):
                total[label] = float(in_float64(found).sum())
        sums.append([total[label] for label in SUMMED])
    return torch.tensor(sums, dtype=torch.float64)


def _loss_table(tokens: float, *sums: float) -> dict[str, Any]:
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
