"""`--dry-run`: the very prompts of a few latents, and about what the whole run would ask and cost. No model is asked.

The prompts come from a small part of the text, looked at in a temporary folder. Little text holds few windows of a
latent, so they are repeated until there are as many as the config asks for: requests are counted as of a latent that
has them all. What a server can do is not probed; it is taken to give log-probabilities and to keep to a schema. Not
counted are questions that are asked once more because an answer failed, nor those left out because one is known.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice

from interp.client.ledger import estimated_accounts
from interp.client.requests import ROLES, Abilities, Chat, LogProb, Request
from interp.evidence.examples import ExampleConfig
from interp.explainers import Explainer
from interp.records import ACTIVE, SPLITS, TIERS, Examples, Explanation, Item, Judgement
from interp.run.config import ExplainConfig
from interp.run.kept import messages_of
from interp.run.latents import asked_latents
from interp.run.pipeline import FEWEST_FOR_NULL
from interp.run.preparing import NOTHING, Given, Prepared, prepare
from interp.scorers import Trial

SAMPLE_TOKENS = 60_000
LATENTS = 3
ABLE = Abilities(choices=True, structured="json_schema", prompt_logprobs=True)
LABEL = "(the explanation stands here)"


@dataclass(frozen=True)
class Asked:
    """A request about one latent."""

    title: str
    """What it is for."""
    request: Request
    null: bool = False
    """Whether it is asked with another latent's explanation too."""


def dry_run(config: ExplainConfig, given: Given = NOTHING) -> list[str]:
    """Returns the lines to print, given a resolved config."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = min(SAMPLE_TOKENS, config.evidence.tokens or SAMPLE_TOKENS)
        small = replace(config, run_dir=folder, evidence=replace(config.evidence, tokens=tokens, store=False))
        small = replace(small, latents="random:50")
        prepared = prepare(small, given)
        return list(lines(config, prepared))


def lines(config: ExplainConfig, prepared: Prepared) -> Iterator[str]:
    """Yields the lines, given what was found in a part of the text."""
    found = sorted(map(prepared.examples, prepared.latents.tolist()), key=lambda examples: -len(examples.test))
    shown = [filled(examples, config.examples) for examples in found if _has_both(examples)][:LATENTS]
    if not shown:
        yield f"no latent has an example in the first {SAMPLE_TOKENS:,} tokens; there is no prompt to show"
        return
    asked = [list(requests(config, prepared, examples)) for examples in shown]
    firsts: dict[str, Request] = {}
    for one in asked[0]:
        firsts.setdefault(one.title, one.request)
    for title, request in firsts.items():
        yield from ("", f"--- {title}, latent {shown[0].latent}, to the {request.role}", *_told(request))
    meant, d_sae = asked_latents(config.latents, prepared.evidence.d_sae), prepared.evidence.d_sae
    latents = d_sae if meant == "alive" else min(meant, d_sae) if isinstance(meant, int) else len(meant)
    null = latents if config.null_latents < 0 else min(config.null_latents, latents)
    null = null if latents >= FEWEST_FOR_NULL and config.only != "explain" else 0
    bound = "up to " if meant == "alive" else ""
    yield from ("", f"{bound}{latents:,} latents; of {null:,} the scores are also taken with another's explanation")
    counts = [(one, (latents + null * one.null) / len(shown)) for latent in asked for one in latent]
    yield from _costs(config, counts)


def requests(config: ExplainConfig, prepared: Prepared, examples: Examples) -> Iterator[Asked]:
    """Yields everything that is asked about one latent, if all candidates differ and all judgements are wrong."""
    if config.only == "evidence":
        return
    label = Explanation(examples.latent, LABEL, "")
    sources = [label] if config.explanations else []
    for name, explainer in config.all_explainers().items():
        asks = explainer.requests(examples, ABLE)
        found = [label] * len(asks) if explainer.needs_llm else explainer.explanations(examples, [])
        sources += found[:1]
        if config.only != "score":
            yield from (Asked(f"explainer {name}", request) for request in asks)
            yield from _chosen(config, name, explainer, examples, found)
    if config.only == "explain":
        return
    for name, scorer in config.all_scorers().items():
        if not config.endpoint(scorer.role).model:
            continue
        ready, null = scorer.prepare(examples, prepared.subject), scorer.needs_explanation
        parts = [scorer.tasks(examples, part, ready) for part in (("test", "valid") if scorer.tunes else ("test",))]
        for source in sources if null else [label]:
            for tasks in parts:
                for request in scorer.requests(Trial(source, tasks, ABLE)):
                    yield Asked(f"scorer {name}", request, null)


def _chosen(
    config: ExplainConfig, name: str, explainer: Explainer, examples: Examples, found: list[Explanation]
) -> Iterator[Asked]:
    """Yields what it takes to choose between candidates on the valid split, and to correct the best of them."""
    if not found or (len(found) == 1 and not explainer.refines):
        return
    chooser = config.chooser()
    tasks = chooser.tasks(examples, "valid", {})
    wrong = [(task, Judgement(1 - task.truth)) for task in tasks]
    better = explainer.refined(examples, found[0], wrong, ABLE) if explainer.refines else []
    yield from (Asked(f"correction by {name}", request) for request in better)
    for candidate in [*found, *found[: len(better)]]:
        for request in chooser.requests(Trial(candidate, tasks, ABLE)):
            yield Asked(f"choice of {name}", request)


def filled(examples: Examples, config: ExampleConfig) -> Examples:
    """Returns examples with as many windows of every kind as the config asks for, what is there again and again."""
    everything = [item for split in SPLITS for item in examples.of(split)]

    def part(split: str, **sizes: int) -> tuple[Item, ...]:
        items: list[Item] = []
        for tier, n in sizes.items():
            there = [item for item in examples.of(split) if item.tier == tier]
            alike = [replace(item, tier=tier) for item in everything if item.active == (tier == ACTIVE)]
            items += islice(cycle(there or alike), n)
        return tuple(items)

    return replace(
        examples,
        explain=part("explain", **{ACTIVE: config.shown, TIERS[0]: config.contrast}),
        valid=part("valid", **{ACTIVE: config.valid, TIERS[0]: config.valid}),
        test=part("test", **dict.fromkeys((ACTIVE, *TIERS), config.test)),
    )


def _has_both(examples: Examples) -> bool:
    """Returns whether there is an active window and a silent one."""
    return len({item.active for split in SPLITS for item in examples.of(split)}) == 2


def _costs(config: ExplainConfig, asked: list[tuple[Asked, float]]) -> Iterator[str]:
    """Yields a line for every role, and the sum, given requests and how often each is asked."""
    endpoints = {role: config.endpoint(role) for role in ROLES}
    calls, sent, answered = (defaultdict[str, float](float) for _ in range(3))
    for one, times in asked:
        for role, account in estimated_accounts([one.request], endpoints).items():
            calls[role] += times
            sent[role] += times * (account.tokens_in + sum(map(_more, _texts(one.request))))
            answered[role] += times * account.tokens_out
    whole, unknown = 0.0, ""
    for role in sorted(calls):
        prices, cost = endpoints[role].prices, "at an unknown price"
        if prices is None:
            unknown = ", and what has no known price"
        else:
            usd = sent[role] * prices[0] + answered[role] * prices[1]
            whole, cost = whole + usd, f"{usd:.2f} USD"
        counted = f"{calls[role]:,.0f} requests, {sent[role]:,.0f} tokens in, at most {answered[role]:,.0f} out"
        yield f"{role}: {endpoints[role].model or 'the subject'}, {counted}, {cost}"
    yield f"about {whole:.2f} USD{unknown}; tokens are guessed by their characters, and cached prefixes cost less"


def _more(text: str) -> float:
    """Returns how many tokens a text has beyond a quarter of its characters, about: scripts other than Latin and the
    marks and digits of code are cut more finely. A quarter for every further byte in UTF-8 and every mark or digit.
    """
    marks = sum(c.isascii() and not (c.isalpha() or c.isspace()) for c in text)
    return (len(text.encode(errors="replace")) - len(text) + marks) / 4


def _texts(request: Request) -> tuple[str, ...]:
    if isinstance(request, Chat):
        return tuple(text for _, text in request.messages)
    return (request.text,) if isinstance(request, LogProb) else request.texts


def _told(request: Request) -> list[str]:
    chat = isinstance(request, Chat)
    return [line for role, text in messages_of(request) for line in ([f"[{role}]", text] if chat else [text])]
