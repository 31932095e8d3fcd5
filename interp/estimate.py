"""`--dry-run`: the very prompts of a few latents, and what the whole run would ask and cost. No model is asked.

The prompts come from a small part of the text, looked at in a temporary folder. What a server can do is not probed; it
is taken to give log-probabilities and to keep to a schema.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace

from interp.client.ledger import estimate
from interp.client.requests import ROLES, Abilities, Chat, LogProb, Request
from interp.config import ExplainConfig
from interp.preparing import Prepared, chosen_latents, prepare
from interp.records import Examples, Explanation

SAMPLE_TOKENS = 60_000
LATENTS = 3
ABLE = Abilities(choices=True, structured="json_schema", prompt_logprobs=True)
LABEL = "(the explanation stands here)"


def dry_run(
    config: ExplainConfig, trust_remote_code: bool = False, should_stop: Callable[[], bool] = lambda: False
) -> list[str]:
    """Returns the lines to print, given a resolved config."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = min(SAMPLE_TOKENS, config.evidence.tokens or SAMPLE_TOKENS)
        small = replace(config, run_dir=folder, evidence=replace(config.evidence, tokens=tokens, store=False))
        small = replace(small, latents="50")
        prepared = prepare(small, should_stop, trust_remote_code)
        return list(_lines(config, prepared))


def _lines(config: ExplainConfig, prepared: Prepared) -> Iterator[str]:
    shown = [found for found in map(prepared.examples, prepared.latents.tolist()) if not found.missing][:LATENTS]
    if not shown:
        yield f"no latent has enough examples in the first {SAMPLE_TOKENS:,} tokens; there is no prompt to show"
        return
    asked: list[Request] = []
    for number, examples in enumerate(shown):
        for title, request in _requests(config, prepared, examples):
            asked.append(request)
            if number == 0 and title:
                yield from ("", f"--- {title}, latent {examples.latent}, to the {request.role}", *_told(request))
    latents = _planned(config, prepared)
    null = latents if config.null_latents < 0 else min(config.null_latents, latents)
    yield ""
    yield f"{latents:,} latents; of {null:,} the scores are also taken with another latent's explanation"
    found = estimate(asked, {role: config.endpoint(role) for role in ROLES})
    whole = 0.0
    for role, account in sorted(found.items()):
        factor = (latents + (null if role != "explainer" else 0)) / len(shown)
        calls, sent, answered = (round(n * factor) for n in (account.calls, account.tokens_in, account.tokens_out))
        cost = "at an unknown price" if account.usd is None else f"{account.usd * factor:.2f} USD"
        whole += (account.usd or 0.0) * factor
        model = config.endpoint(role).model or "the subject"
        yield f"{role}: {model}, {calls:,} requests, {sent:,} tokens in, at most {answered:,} out, {cost}"
    yield f"at most {whole:.2f} USD, tokens being a quarter of the characters; cached prefixes cost less"


def _planned(config: ExplainConfig, prepared: Prepared) -> int:
    """How many latents the run is about, as far as it can be said without its evidence."""
    typed = config.latents
    if typed.strip().isdecimal():
        return int(typed)
    return len(chosen_latents(typed, prepared.evidence, config.seed))


def _requests(config: ExplainConfig, prepared: Prepared, examples: Examples) -> Iterator[tuple[str, Request]]:
    """Yields (title, request); only the first of each kind has a title."""
    if config.only != "score":
        for name, explainer in config.all_explainers().items():
            for i, request in enumerate(explainer.requests(examples, ABLE)):
                yield f"explainer {name}" if i == 0 else "", request
    if config.only != "explain":
        label = Explanation(examples.latent, LABEL, "")
        for name, scorer in config.all_scorers().items():
            if not config.endpoint(scorer.role).model:
                continue
            ready = scorer.prepare(examples, prepared.subject)
            for i, request in enumerate(
                scorer.requests(label, scorer.tasks(examples, "test", ready), examples.facts, ABLE)
            ):
                yield f"scorer {name}" if i == 0 else "", request


def _told(request: Request) -> list[str]:
    if isinstance(request, Chat):
        return [line for role, text in request.messages for line in (f"[{role}]", text)]
    return [request.text] if isinstance(request, LogProb) else [*request.texts[:3], "..."]
