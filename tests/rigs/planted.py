"""Latents whose meaning is known: each fires on its own words, and a good explanation names these words."""

import random

from interp.records import ACTIVE, Examples, Explanation, Facts, Item, Window
from interp.scorers import Trial

FACTS = Facts(100, 10_000, {"explain": 0.05, "valid": 0.05, "test": 0.05}, 9.0, (), ())
TOPICS = (
    ("river", "lake", "ocean", "flood"),
    ("violin", "choir", "melody", "drum"),
    ("bishop", "altar", "prayer", "hymn"),
    ("copper", "steel", "nickel", "iron"),
)
SENTENCE = "and then they said it was not there because some people had been waiting for another day in town"
FILLER = SENTENCE.split()


def window(words, values=None, section=0, start=0):
    """A window with one token a word, each with the space before it; `values` are activations by place."""
    pieces = [f" {word}" for word in words]
    bounds = [0]
    for piece in pieces:
        bounds.append(bounds[-1] + len(piece))
    tokens = tuple(sum(map(ord, word)) for word in words)
    activations = tuple(float((values or {}).get(place, 0.0)) for place in range(len(words)))
    return Window(section, start, tokens, "".join(pieces), tuple(bounds), activations, 0)


def examples(latent, n=30, seed=0, length=14, topics=TOPICS):
    """The latent fires on the words of its topic; silent windows have words of other topics now and then."""
    draw, items = random.Random(f"{latent} {seed}"), []
    for number in range(2 * n):
        words = [draw.choice(FILLER) for _ in range(length + number % 5)]
        values = {}
        if number < n:
            for place in draw.sample(range(3, len(words)), 2):
                words[place], values[place] = draw.choice(topics[latent]), draw.uniform(1, 9)
        else:
            other = draw.choice([topic for topic in topics if topic is not topics[latent]])
            words[draw.randrange(len(words))] = draw.choice(other)
        tier = ACTIVE if values else ("random", "same_token", "neighbor")[number % 3 if number % 2 else 0]
        items.append(Item(window(words, values, number // 2, number * 100), tier, number % 10 if values else -1))
    draw.shuffle(items)
    return Examples(latent, FACTS, valid=tuple(items[::3]), test=tuple(items))


def right(latent, topics=TOPICS):
    """The explanation that names the latent's words."""
    words = ", ".join(f'" {word}"' for word in topics[latent])
    return Explanation(latent, f"fires on the tokens {words}", "planted")


def run(scorer, explanation, given, abilities, answer, split="test", prepared=None):
    """Asks and scores: `answer` is from a request to a reply. Returns (score, judgements, requests)."""
    prepared = prepared or {}
    parts = {}
    for part in ("valid", split) if scorer.tunes else (split,):
        tasks = scorer.tasks(given, part, prepared)
        requests = scorer.requests(Trial(explanation, tasks, abilities))
        replies = [answer(request) for request in requests]
        parts[part] = tasks, scorer.judgements(Trial(explanation, tasks, abilities), replies), requests
    threshold = None
    if scorer.tunes:
        from interp.scoring.metrics import best_threshold

        tasks, found, _ = parts["valid"]
        answered = [(j.value, t.truth) for t, j in zip(tasks, found, strict=True) if j.valid]
        threshold = best_threshold(*zip(*answered, strict=True)) if answered else None
    tasks, found, requests = parts[split]
    return scorer.score(tasks, found, given.facts, threshold), found, requests
