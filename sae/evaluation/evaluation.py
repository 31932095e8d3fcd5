"""Held-out evaluation: how well a coder reconstructs, and what the language model loses when it is spliced in.

Pass 1 stops the model at the last site and gathers reconstruction metrics and the mean activation. Pass 2 goes on from
there, and runs the model spliced, zero-ablated and mean-ablated from where that begins to differ. The same mask holds
in every arm: masked positions are neither replaced nor counted. Losses are averaged over tokens first; ratios are
formed once, at the end.
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
from sae.coder.arguments import as_coders
from sae.coder.coder import SparseCoder
from sae.coder.spec import RELEASED, CoderSpec
from sae.evaluation.figures import (
    Figures,
    both_modes,
    evaluate_stored,
    fold_modes,
    held_out_of,
    results_of,
    without_overflow,
)
from sae.evaluation.looking import Looking
from sae.evaluation.losses import losses, writing
from sae.evaluation.models import models_of
from sae.evaluation.sharing import Sharing
from sae.evaluation.tables import Evaluation
from sae.lm.files import loading_bars
from sae.lm.masking import token_mask
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
    causal = {tag: writing(modes, tag) for tag, model in models.items() if model.is_causal}
    log.info("evaluating on %s held-out tokens", f"{sum(int(token_mask(part, spec.mask).sum()) for part in batches):,}")
    own = share.of(len(batches))
    batches = batches[own.start : own.stop]
    passes = len(batches) * (1 + sum(map(len, causal.values())))
    with torch.no_grad(), watch.stage("evaluating", passes, "passes", visible=sharing.shows) as stage:

        def advance() -> None:
            stage.update(stage.n + 1)
            watch.poll("during evaluation")

        looking = Looking(modes, models, room=4 * PASS_LOGITS if any(causal.values()) else 0)
        results, means = _reconstruct(modes, looking, batches, nulls, advance, sharing)
        for tag, some in causal.items():
            if some:
                for name, found in losses(some, looking, tag, batches, means, advance, sharing).items():
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
    looking: Looking,
    batches: list[Int[Tensor, "_rows context"]],
    nulls: bool,
    advance: Callable[[], None],
    sharing: Sharing,
) -> tuple[dict[str, Any], dict[str, Float[Tensor, "_d"]]]:
    """Returns the metrics of pass 1 and the mean activation at the sites written, by coder."""
    figures = {name: Figures(coder, nulls) for name, coder in coders.items()}
    with sharing.measuring():
        for number, batch in enumerate(batches):
            advance()
            seen = looking.at(number, batch)
            for found in figures.values():
                keep = token_mask(batch, found.coder.spec.mask).to(looking.models[""].device)
                tensors = (seen.activations, seen.gradients)
                found.update(*({name: x[keep] for name, x in of.items()} for of in tensors))
    results = results_of(figures, sharing)
    return results, {name: found.filtered.target.mean.float() for name, found in figures.items()}
