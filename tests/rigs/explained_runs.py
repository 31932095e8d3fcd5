"""Folders of explained runs that nobody explained: plausible, as large as is wanted, and made in seconds.

Texts are slices of Python's manual, figures follow from drawn answers, and every status that a latent can end with is
there. So pages can be tried at any size, and with text that means them harm.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np

from interp.client.config import EndpointConfig
from interp.client.requests import Chat
from interp.evidence.first_pass import LATENTS as EVIDENCE
from interp.evidence.tally import BINS, POSITION_BINS, Sizes, Tally
from interp.explainers import Explainer
from interp.prompts.explaining import explanation_messages
from interp.prompts.judging import DETECTION, one_text
from interp.prompts.windows import shown
from interp.records import (
    ACTIVE,
    TIERS,
    Excerpt,
    Explanation,
    Facts,
    Item,
    Judgement,
    Measure,
    Score,
    Task,
    Together,
    Window,
)
from interp.run.config import CoderConfig, ExplainConfig, ModelsConfig
from interp.run.flows import task_columns
from interp.run.kept import asked_kept, excerpts_kept, seen_kept
from interp.run.results import write_results
from interp.run.rundir import ENVIRONMENT, LATENTS
from interp.scorers import Scorer
from interp.scoring.metrics import score_of
from sae.base.files import atomic_write, write_json
from sae.base.plugins import names
from sae.base.settings import to_yaml
from sae.base.store import ShardWriter

HOSTILE = "</script><script>alert(1)</script>\"'>&lt;<img src=x onerror=alert(2)>\u202eRTL\u200b\x1b[31m\nnext=== x end"
LLM = "gpt-4o-mini"
TOKENS = 1_000_000
LENGTH = 32
NULL_LATENTS = 200
REFERENCE = {"token_lookup": False, "llm": True}
"""Explainers, and whether they ask a model."""
STATUSES = {3: "dead", 17: "insufficient", 31: "failed", 47: "none", 61: "unasked", 73: "partial"}
"""By latent modulo 100, how the work on it ended where not well: `dead` and `insufficient` ones by every explainer."""


@lru_cache(None)
def _manual() -> tuple[list[str], list[int]]:
    """Pieces of Python's manual, about as large as tokens, and a number for each."""
    pieces = re.findall(r"\s?[A-Za-z]{1,7}|\s+|[^\sA-Za-z]", "\n".join(topics.topics.values()))
    numbers = {piece: number for number, piece in enumerate(sorted(set(pieces)))}
    return pieces, [numbers[piece] for piece in pieces]


def _window(draw: random.Random, start: int, strength: float, hostile: str) -> Window:
    pieces, numbers = _manual()
    at = draw.randrange(len(pieces) - LENGTH)
    some, peak = pieces[at : at + LENGTH], draw.randrange(8, 28)
    if hostile:
        some = [*some[:3], hostile, *some[4:]]
    values = [0.0] * LENGTH
    if strength:
        for place in {peak, draw.randrange(LENGTH), peak - 1}:
            values[place] = strength * draw.uniform(0.2, 1)
        values[peak] = strength
    bounds = tuple(accumulate(map(len, some), initial=0))
    values = np.array(values, np.float32).tolist()
    return Window(at // 1000, start, tuple(numbers[at : at + LENGTH]), "".join(some), bounds, tuple(values), peak)


def _facts(draw: random.Random, latent: int, d_sae: int, fired: int, hostile: str) -> Facts:
    pieces = [*_manual()[0][latent * 7 : latent * 7 + 30], *["the"] * 30][:30]
    histogram, positions = [0] * BINS, [0] * POSITION_BINS
    middle = draw.randrange(18, 34)
    for counts, places in ((histogram, range(middle - 5, middle + 6)), (positions, range(POSITION_BINS))):
        cuts = sorted(draw.randrange(fired + 1) for _ in range(len(places) - 1))
        for place, n in zip(places, np.diff([0, *cuts, fired]).tolist(), strict=True):
            counts[place] = n
    others = [(latent + step) % d_sae for step in (1, 5, 19, 101, 7, 3, 11, 13)]
    rates = dict.fromkeys(("explain", "valid", "test"), min(1.0, 20 * fired / TOKENS))
    return Facts(
        fired,
        TOKENS,
        rates,
        largest=float(np.float32(2 ** ((middle - 20) / 2))),
        histogram=tuple(histogram),
        positions=tuple(positions),
        top_tokens=tuple((piece + hostile, 0.5**place) for place, piece in enumerate(pieces[:10], 1)),
        promoted=tuple(piece + hostile for piece in pieces[10:20]),
        suppressed=tuple(pieces[20:30]),
        neighbors=tuple((other, 0.9 - 0.1 * place) for place, other in enumerate(others)),
        together=tuple(Together(other, 0.8 / place, 30.0 / place, 160) for place, other in enumerate(others, 1)),
    )


def _items(draw: random.Random, latent: int, n: int, strength: float, hostile: str) -> list[Item]:
    """So many active windows, and as many silent ones of each tier."""
    found = []
    for tier in (ACTIVE, *TIERS):
        for place in range(n):
            decile = place * 10 // n if tier == ACTIVE else -1
            window = _window(draw, (latent * 4000 + len(found)) * LENGTH, strength * (decile + 1) / 10, hostile)
            found.append(Item(window, tier, decile, (window.peak,)))
    draw.shuffle(found)
    return found


def _judged(draw: random.Random, name: str, items: Sequence[Item], skill: float) -> tuple[list[Task], list[Judgement]]:
    """What a judge of some skill, from 0 (it guesses) to 1, answers."""
    if name == "intervention":
        tasks = [Task((), 1.0, section=i, text=f"{i.window.text} more", clean=i.window.text) for i in items[:10]]
        tasks = [Task((), 1.0, section=at, text=one.text, clean=one.clean) for at, one in enumerate(tasks)]
        return tasks, [Judgement(draw.gauss(skill, 1)) for _ in tasks]
    active, silent = ([item for item in items if item.active == kind] for kind in (True, False))
    if name == "intruder":
        tasks = []
        for odd in silent[:10]:
            windows = [*draw.sample(active, min(4, len(active)))]
            at = draw.randrange(len(windows) + 1)
            tasks.append(Task((*windows[:at], odd, *windows[at:]), float(at)))
        away = [0 if draw.random() < 0.2 + 0.8 * skill else 1 for _ in tasks]
        return tasks, [Judgement((task.truth + step) % 5) for task, step in zip(tasks, away, strict=True)]
    tasks = [Task((item,), float(item.active), item.tier, item.decile, item.window.section) for item in items]
    answers = []
    for task in tasks:
        p = min(1.0, max(0.0, draw.gauss(0.5 + (task.truth - 0.5) * skill, 0.25)))
        actual = [abs(value) for value in task.items[0].window.activations]
        levels = tuple(9 * p * value / max(1e-9, *actual) for value in actual) if name == "simulation" else ()
        answers.append(Judgement(p, levels=levels))
    return tasks, answers


def _score(scorer: Scorer, misses: Sequence[float | None], judgements: Sequence[Judgement]) -> Score:
    """A score whose headline is the share that is right, with an interval about as wide as it would be."""
    answered = [miss for miss in misses if miss is not None]
    value = sum(miss <= 0.5 for miss in answered) / max(1, len(answered))
    headline = Measure(value, max(0.0, value - 0.07), min(1.0, value + 0.07)) if answered else Measure(None)
    chance = {} if scorer.needs_explanation else {"chance": Measure(0.2, 0.2, 0.2)}
    more = {f"recall_decile_{decile}": Measure(value, 0.0, 1.0) for decile in range(10)}
    return score_of({scorer.headline: headline, **chance, **more}, judgements)


def _score_row(
    draw: random.Random, key: dict[str, Any], scorer: Scorer, items: list[Item], text: str, lost: float
) -> Any:
    rule, name = key["explainer"] == "token_lookup" and scorer.takes_rules, Scorer.get_choice_name(type(scorer))
    tasks, judgements = _judged(draw, name, items, 0.05 if key["null"] else draw.betavariate(3, 2))
    if rule:
        judgements = [Judgement(float(found.value > 0.5)) for found in judgements]
    judgements = [Judgement(None, "timeout") if draw.random() < lost else found for found in judgements]
    misses = scorer.misses(tasks, judgements)
    score = _score(scorer, misses, judgements)
    status = "failed" if lost > 0.5 else "partial" if score.invalid else "ok"
    row = key | {"explanation": text, "judge": "tfidf" if scorer.role == "encoder" else LLM, "status": status}
    row |= {"reason": ", ".join(f"{n} {kind}" for kind, n in score.invalid.items()), "messages": {}, "by_rule": rule}
    row |= {"answers": "" if rule else "probabilities", "score": asdict(score), "threshold": None}
    if not key["null"]:
        chats = [] if rule else [Chat("judge", one_text(DETECTION, text, shown(items[0].window)), 1)]
        row |= {"seen": seen_kept(scorer, tasks, judgements, misses), "asked": asked_kept(chats)}
    row |= {"tasks": task_columns(tasks), "values": [found.value for found in judgements]}
    row["levels"] = [list(found.levels) for found in judgements] if name == "simulation" else []
    row["reasons"] = {str(i): found.reason for i, found in enumerate(judgements) if not found.valid}
    return row


def _rows(
    latent: int, n: int, config: ExplainConfig, windows: int, hostile: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rows of a latent, each with the journal that it belongs in."""
    draw, status = random.Random(latent), STATUSES.get(latent % 100, "ok")
    if status == "unasked":
        return
    fired = 0 if status == "dead" else max(1, int(TOKENS * 10 ** draw.uniform(-5, -1)))
    facts = _facts(draw, latent, n, fired, hostile)
    items = _items(draw, latent, windows, facts.largest, hostile) if fired else []
    missing = {"dead": f"dead: it fires on none of {TOKENS:,} tokens", "insufficient": "insufficient: 4 windows"}
    strongest = [_window(draw, latent * 4000 + at, facts.largest, hostile) for at in range(8 if fired else 0)]
    active = sorted((item for item in items if item.active), key=lambda item: -item.decile)
    sampled = [Excerpt(item.window, item.decile, "test") for item in active][:20]
    row: dict[str, Any] = {"latent": latent, "facts": asdict(facts), "missing": missing.get(status, "")}
    yield (
        "examples",
        row
        | {
            "strongest": excerpts_kept([Excerpt(one, 9, "explain") for one in strongest]),
            "sampled": excerpts_kept(sampled),
        },
    )
    for explainer in config.explainers:
        asks = explainer == "llm"
        ended = status if status in missing or (asks and status in ("failed", "none")) else "ok"
        words = "".join(_manual()[0][latent * 11 % 100_000 :][: 12 if asks else 5])
        text = " ".join(f"words such as {words} {hostile}".split())
        row = {"latent": latent, "explainer": explainer, "by": LLM + hostile if asks else "", "status": ended}
        row["reason"] = missing.get(status, {"failed": "1 timeout", "none": "1 unusable"}.get(ended, ""))
        if asks and items:
            chat = Chat("explainer", explanation_messages(items[:20], items[20:25], facts.promoted), 256)
            row["asked"] = asked_kept([chat])
        told = Explanation(latent, text, explainer, row["by"]).to_json() if ended == "ok" else None
        yield "explain", row | {"messages": {"timeout": f"no answer in time {hostile}"}, "explanation": told}
        if ended != "ok":
            continue
        for name, scorer in config.scorers.items():
            for null in (False, True):
                if scorer.needs_explanation and (not null or latent < NULL_LATENTS):
                    key = {"latent": latent, "scorer": name, "explainer": explainer, "null": null, "of": latent}
                    lost = {"partial": 0.2, "failed": 0.8}.get(status, 0.0)
                    yield "score", _score_row(draw, key, scorer, items, text, lost)
    for name, scorer in config.scorers.items():
        if not scorer.needs_explanation and status not in missing:
            key = {"latent": latent, "scorer": name, "explainer": "", "null": False, "of": latent}
            yield "score", _score_row(draw, key, scorer, items, "", 0.0)


def write_explained_run(
    folder: Path,
    n: int,
    explainers: Sequence[str] = ("token_lookup", "llm"),
    scorers: Sequence[str] = ("detection", "embedding"),
    hostile: str = "",
    windows: int = 12,
) -> Path:
    """Writes the folder of a run on n latents, all that its coder has, and returns it.

    Args:
        folder: where; created.
        n: latents. By their last two digits some are dead, have too few examples, failed, or were not come to.
        explainers: kinds of explainers; of them `llm` says that it asked a model.
        scorers: kinds of scorers.
        hostile: text that stands in every label, token, prompt, name of a model and message of an error.
        windows: active windows of the test part, and silent ones of each tier.
    """
    kinds = {name: names(Scorer)[name]() for name in scorers}
    models = ModelsConfig(judge=EndpointConfig(LLM), explainer=EndpointConfig(LLM))
    config = ExplainConfig(
        run_dir=str(folder),
        coder=CoderConfig("runs/made-up"),
        explainers={name: names(Explainer)[name]() for name in explainers},
        scorers=kinds,
        models=models,
    )
    shard = folder / "shards" / "1-of-1"
    shard.mkdir(parents=True)
    atomic_write(folder / "config.yaml", to_yaml(config))
    about = {"coder": "runs/made-up", "baseline": "none", "model": f"made/up{hostile}", "text": "manual"}
    write_json(folder / ENVIRONMENT, {"about": {**about, "tokens": TOKENS, "seed": 0}})
    write_json(shard / LATENTS, list(range(n)))
    tally = Tally(n, 128, Sizes(1, 1, 1, 1), 0)
    tally.tokens[:] = TOKENS
    files = {name: (shard / f"journal-{name}.jsonl").open("w") for name in ("examples", "explain", "score")}
    for latent in range(n):
        for name, row in _rows(latent, n, config, windows, hostile):
            files[name].write(json.dumps({"version": 1, **row}, allow_nan=False) + "\n")
            if name == "examples":
                tally.fired[latent] = row["facts"]["fired"]
                tally.histogram[latent], tally.positions[latent] = row["facts"]["histogram"], row["facts"]["positions"]
    for file in files.values():
        file.close()
    writer = ShardWriter(folder / "evidence" / EVIDENCE, "evidence", {"made": "up"})
    writer.write(0, tally.state())
    writer.finish({})
    write_results(folder, kinds, about)
    return folder
