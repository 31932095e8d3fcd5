"""Held-out evaluation: how well a coder reconstructs, and what the language model loses when it is spliced in.

Pass 1 stops the model at the last site and gathers reconstruction metrics and the mean activation. Pass 2 runs the
whole model clean, spliced, zero-ablated and mean-ablated. The same mask holds in every arm: masked positions are
neither replaced nor counted. Losses are averaged over tokens first; ratios are formed once, at the end.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.activations import capture, counted, hooked, model_inputs, next_token_losses, norm_mask, token_mask, widths
from sae.coder import SparseCoder
from sae.errors import ConfigError, Stopped
from sae.intervene import replace_at, splice
from sae.metrics import Moments, Reconstruction, kl_divergence, recovered
from sae.models import LanguageModel, load_language_model
from sae.nulls import null_fvus
from sae.settings import decode
from sae.spec import CoderSpec
from sae.text import TextConfig, TokenRows, tokenize

PASS_LOGITS = 2**25  # most logits held at once, per copy: 128 MiB


def evaluate(
    coders: SparseCoder | dict[str, SparseCoder],
    lm: LanguageModel | None = None,
    rows: TokenRows | None = None,
    tokens: int = 16_384,
    nulls: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Returns the metrics of a coder on about `tokens` held-out tokens; of several coders, a dict by name.

    Rows are taken evenly from the whole held-out part: the first ones may all come from one long document.
    The model and the held-out rows default to those the (first) coder's spec names: where it was trained.
    Keys: `reconstruction` (with the norm filter) and `reconstruction_unfiltered`, `density`, `loss` (CE and KL of every
    arm; absent for a model that predicts no next token), `nulls` on request. Units are nats per token.
    """
    several = coders if isinstance(coders, dict) else {"": coders}
    for name, coder in several.items():
        if not coder.spec.reads or not coder.spec.writes:
            raise ConfigError(f"coder {name}: its spec names no site to read; set spec.reads and spec.writes")
    spec = next(iter(several.values())).spec
    device = next(iter(several.values())).W_enc.device
    lm = lm or load_language_model(spec.reads[0].model, spec.reads[0].revision, device=str(device))
    _check_widths(several, lm)
    rows = rows or tokenize(text_of(spec), lm.tokenizer, lm.source(), should_stop).held_out
    n_rows = min(rows.n_rows, max(1, -(-tokens // rows.context_length)))
    size = rows_per_pass(rows.context_length, getattr(lm.model.config.get_text_config(), "vocab_size", 0))
    chosen = torch.arange(n_rows) * rows.n_rows // n_rows
    batches = [rows.tokens(part) for part in chosen.split(size)]
    with torch.no_grad():
        results, means = _reconstruct(several, lm, batches, nulls, should_stop)
        if lm.is_causal:
            losses = _losses(several, lm, batches, means, should_stop)
            for name in several:
                results[name]["loss"] = losses[name]
    results = {name: _finite(found) for name, found in results.items()}
    return results if isinstance(coders, dict) else results[""]


def _finite(found: Any) -> Any:
    """The metrics with None for what overflowed: a number that is none must not look like one, nor break the JSON."""
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _check_widths(coders: dict[str, SparseCoder], lm: LanguageModel) -> None:
    for name, coder in coders.items():
        for site, width in ((coder.spec.reads[0], coder.spec.d_in), (coder.spec.writes[0], coder.spec.d_out)):
            found = widths(lm, [site])[site.name]
            if found != width:
                raise ConfigError(f"coder {name}: takes {site.name} to have width {width}; in {lm.name} it has {found}")


def text_of(spec: CoderSpec) -> TextConfig:
    """Returns the text a coder was trained on, as its spec describes it."""
    if "text" not in spec.training:
        raise ConfigError("text: the coder's spec does not say what text it was trained on; pass rows")
    return decode(TextConfig, spec.training["text"], "text")


def rows_per_pass(context_length: int, vocabulary: int) -> int:
    """Returns how many rows the evaluation runs at once."""
    return max(1, min(16, PASS_LOGITS // max(1, context_length * vocabulary)))


def _reconstruct(
    coders: dict[str, SparseCoder],
    lm: LanguageModel,
    batches: list[Int[Tensor, "rows context"]],
    nulls: bool,
    should_stop: Callable[[], bool],
) -> tuple[dict[str, Any], dict[str, Float[Tensor, "d"]]]:
    sites = list({site.name: site for c in coders.values() for site in (c.spec.reads[0], c.spec.writes[0])}.values())
    filtered = {name: Reconstruction(coder.spec.d_sae) for name, coder in coders.items()}
    unfiltered = {name: Reconstruction(coder.spec.d_sae) for name, coder in coders.items()}
    moments = {name: Moments() for name in coders}
    held: dict[str, list[Tensor]] = {name: [] for name in coders}
    for batch in batches:
        _poll(should_stop)
        seen = capture(lm, sites, batch)
        for name, coder in coders.items():
            spec = coder.spec
            keep = token_mask(batch, spec.mask).to(lm.device)
            x, target = (
                seen[site.name][keep].to(coder.W_enc.device).float() for site in (spec.reads[0], spec.writes[0])
            )
            usual = norm_mask(x, spec.mask)
            out, latents = coder(x)
            unfiltered[name].update(target, out, latents)
            if usual.all():
                filtered[name].update(target, out, latents)
            else:
                filtered[name].update(target[usual], *coder(x[usual]))
            moments[name].update(target[usual])
            if nulls:
                held[name].append(x[usual].cpu())
    results = {}
    for name in coders:
        if not filtered[name].target.n:
            raise ConfigError(f"coder {name}: its mask leaves none of the held-out tokens; there is nothing to measure")
        unmasked = unfiltered[name].result()
        results[name] = {
            "reconstruction": filtered[name].result(),
            "reconstruction_unfiltered": {key: unmasked[key] for key in ("tokens", "fvu", "ev")},
            "density": filtered[name].density(),
        }
        if nulls:
            x = torch.cat(held[name])
            results[name]["nulls"] = null_fvus(coders[name], x[::2], x[1::2])
    return results, {name: m.mean.float() for name, m in moments.items()}


def _losses(
    coders: dict[str, SparseCoder],
    lm: LanguageModel,
    batches: list[Int[Tensor, "rows context"]],
    means: dict[str, Float[Tensor, "d"]],
    should_stop: Callable[[], bool],
) -> dict[str, dict[str, Any]]:
    sums: dict[str, dict[str, float]] = {name: {} for name in coders}
    counts = dict.fromkeys(coders, 0)

    def logits(tokens: Tensor) -> Tensor:
        return lm.model(**model_inputs(lm, tokens)).logits

    for batch in batches:
        tokens = batch.to(lm.device)
        seen: dict[str, Tensor] = {}
        reads = list({coder.spec.reads[0].name: coder.spec.reads[0] for coder in coders.values()}.values())
        with hooked(lm.model, reads, lambda site, x, seen=seen: seen.update({site.name: x})):
            clean = logits(tokens)
        for name, coder in coders.items():
            _poll(should_stop)
            spec, mean, total = coder.spec, means[name].to(lm.device), sums[name]
            keep = token_mask(tokens, spec.mask) & norm_mask(seen[spec.reads[0].name], spec.mask)
            arms: dict[str, Any] = {
                "spliced": splice(lm.model, coder, keep),
                "zero": replace_at(lm.model, spec.writes[0], torch.zeros_like, keep),
                "mean": replace_at(lm.model, spec.writes[0], lambda x, m=mean: m.to(x.dtype).expand_as(x), keep),
            }
            clean_losses = next_token_losses(clean, tokens, keep)
            counts[name] += len(clean_losses)
            _add(total, "clean", clean_losses)
            for arm, change in arms.items():
                with change:
                    patched = logits(tokens)
                _add(total, arm, next_token_losses(patched, tokens, keep))
                _add(total, f"kl_{arm}", kl_divergence(clean, patched, counted(tokens, keep)))
    return {name: _loss_table(sums[name], counts[name]) for name in coders}


def _loss_table(sums: dict[str, float], count: int) -> dict[str, Any]:
    ce = {name: value / max(1, count) for name, value in sums.items()}
    return {
        "tokens": count,
        "ce_clean": ce["clean"],
        "ce_spliced": ce["spliced"],
        "ce_zero": ce["zero"],
        "ce_mean": ce["mean"],
        "ce_added": ce["spliced"] - ce["clean"],
        "ce_recovered": recovered(ce["clean"], ce["spliced"], ce["zero"]),
        "ce_recovered_from_mean": recovered(ce["clean"], ce["spliced"], ce["mean"]),
        "kl_spliced": ce["kl_spliced"],
        "kl_zero": ce["kl_zero"],
        "kl_mean": ce["kl_mean"],
        "kl_score": recovered(0.0, ce["kl_spliced"], ce["kl_zero"]),
    }


def _add(sums: dict[str, float], name: str, losses: Float[Tensor, "n"]) -> None:
    sums[name] = sums.get(name, 0.0) + float(losses.double().sum())


def _poll(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Stopped("during evaluation")
