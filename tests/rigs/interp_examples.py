"""Examples built by hand, and a judge that reads what it is asked out of the message, as a model would.

A planted latent fires on some words, here only after a certain one. Windows are 32 words, a word is a token. An
explanation in the judge's language is "words: apple, pear; after: ripe": true of these words, after that one.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from interp.client.requests import Abilities, Chat, Reply
from interp.records import ACTIVE, Examples, Explanation, Facts, Item, Window
from interp.scorers import Trial

LENGTH = 32
FRUIT = ("apple", "pear", "plum", "fig")
BEFORE = "ripe"
OTHERS = ("cheese", "idea")  # what a neighbor fires on after the same word
FILLER = re.findall(
    r"\w+",
    "the of and to in is was for on that with as by at from it an be this which or are not had has but were they one "
    "all you would there their we him been when who will more no if out so said what up its about into than them",
)

SINGLE = Abilities(choices=True)
BATCH = Abilities(structured="json_schema")
RIGHT = f"words: {', '.join(FRUIT)}; after: {BEFORE}"


def make_window(
    words: Sequence[str], fired: dict[int, float] | None = None, section: int = 0, peak: int = 0, start: int = 0
) -> Window:
    """Returns a window of words, each a token with the space before it; `fired` maps places to activations."""
    pieces = [" " + word for word in words]
    bounds = [0]
    for piece in pieces:
        bounds.append(bounds[-1] + len(piece))
    activations = tuple((fired or {}).get(place, 0.0) for place in range(len(words)))
    tokens = tuple(zlib.crc32(piece.encode()) for piece in pieces)
    return Window(section, start, tokens, "".join(pieces), tuple(bounds), activations, peak)


def of_pieces(pieces: Sequence[str], section: int = 0) -> Window:
    """Returns a silent window of tokens with any text."""
    window = make_window([""] * len(pieces), section=section)
    bounds = [0]
    for piece in pieces:
        bounds.append(bounds[-1] + len(piece))
    return replace(window, text="".join(pieces), bounds=tuple(bounds))


def facts(**changes: object) -> Facts:
    """Returns facts of a latent that fires in a tenth of the windows."""
    rates = dict.fromkeys(("explain", "valid", "test"), 0.1)
    plain = Facts(fired=100, tokens=10_000, rates=rates, largest=10.0, histogram=(), positions=())
    return replace(plain, **changes)


@lru_cache(None)
def planted(latent: int = 0, n: int = 40, tiers: Sequence[str] = ("random", "same_token", "neighbor")) -> Examples:
    """Returns the examples of a latent that fires on FRUIT after BEFORE: n active windows a split, n silent a tier."""
    draw = random.Random(latent)
    section = 0

    def one(split: str, kind: str, place: int, decile: int) -> Item:
        nonlocal section
        section += 1
        words = [draw.choice(FILLER) for _ in range(LENGTH)]
        if kind in (ACTIVE, "same_token"):
            words[place] = draw.choice(FRUIT)
        if kind in (ACTIVE, "neighbor"):
            words[place - 1] = BEFORE
        if kind == "neighbor":
            words[place] = draw.choice(OTHERS)
        strength = decile + draw.random() if kind == ACTIVE else 0.0
        window = make_window(words, {place: strength}, section, place, section * LENGTH)
        return Item(window, kind, decile if kind == ACTIVE else -1, (place,))

    splits = {}
    for split in ("explain", "valid", "test"):
        places = [draw.randrange(8, 28) for _ in range(n)]
        active = [one(split, ACTIVE, place, i * 10 // n) for i, place in enumerate(places)]
        if split == "explain":
            active.sort(key=lambda item: -item.window.strength)
        chosen = tiers if split == "test" else tiers[:1]
        silent = [one(split, tier, place, -1) for tier in chosen for place in places]
        splits[split] = tuple([*active, *silent])
    return Examples(latent, facts(), **splits)


def label(text: str, latent: int = 0) -> Explanation:
    """Returns an explanation with this text."""
    return Explanation(latent, text, "test")


def unescaped(line: str) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text that a window's line stands for, and the ranges of it that are marked."""
    text, marks, at, begun = "", [], 0, -1
    codes = {"n": "\n", "t": "\t", "r": "\r"}
    while at < len(line):
        if line[at] == "\\" and line[at + 1 : at + 3] == "u{":
            end = line.index("}", at)
            text, at = text + chr(int(line[at + 3 : end], 16)), end + 1
        elif line[at] == "\\":
            text, at = text + codes.get(line[at + 1], line[at + 1]), at + 2
        elif line.startswith("<<", at):
            assert begun < 0, "a mark in a mark"
            begun, at = len(text), at + 2
        elif line.startswith(">>", at):
            assert begun >= 0, "the end of no mark"
            marks, begun, at = [*marks, (begun, len(text))], -1, at + 2
        else:
            text, at = text + line[at], at + 1
    assert begun < 0, "a mark without an end"
    return text, marks


def parts_of(content: str) -> list[tuple[str, str]]:
    """Returns the (label, text) pairs between the fences of a message."""
    fence = re.search(r"^=== \w+ ", content, re.MULTILINE)
    assert fence is not None
    head, *parts = ("\n" + content).split("\n" + fence[0])
    assert fence[0].strip() not in head
    assert parts[-1].split("\n")[0] == "end"
    return [(part.split("\n")[0], "\n".join(part.split("\n")[1:])) for part in parts[:-1]]


def texts_of(chat: Chat) -> tuple[str, list[tuple[str, str]]]:
    """Returns the description in a judge's message, and the (id, text) pairs; the id of a single text is ""."""
    (_, system), *examples, (role, content) = chat.messages
    assert [role for role, _ in examples] == ["user", "assistant"] * (len(examples) // 2)
    assert role == "user"
    assert system
    description = content.split("\n")[0].removeprefix("Description: ") if content.startswith("Description: ") else ""
    if "\n\nText: " in content:
        return description, [("", content.split("\n\nText: ")[1].split("\n\nDoes the description fit")[0])]
    return description, parts_of(content)


def holds(description: str, line: str) -> bool:
    """Returns whether a description in the judge's language is true of a text, or of what is marked in it."""
    text, marks = unescaped(line)
    wanted = re.search(r"words: ([^;]*)", description)
    before = re.search(r"after: (\w+)", description)
    places = [match for match in re.finditer(r"\w+", text)]
    for place, match in enumerate(places):
        if marks and not any(a <= match.start() and match.end() <= b for a, b in marks):
            continue
        if wanted and match[0] not in re.findall(r"\w+", wanted[1]):
            continue
        if before and (place == 0 or places[place - 1][0] != before[1]):
            continue
        return True
    return False


def odd(texts: Sequence[str]) -> int:
    """Returns the place of the text without the word that most others share; of common words, any would do."""
    words = [set(re.findall(r"\w+", text)) - set(FILLER) for text in texts]
    counts = [sum(word in other for other in words) for word in sorted(set().union(*words))]
    if not counts or max(counts) < 2:
        return 0
    shared = max(sorted(set().union(*words)), key=lambda word: sum(word in other for other in words))
    return min(range(len(words)), key=lambda place: shared in words[place])


def judge(chat: Chat) -> Reply:
    """Returns an answer that is right by the description, with some doubt, in the form that is asked for."""
    description, texts = texts_of(chat)
    if not description:  # an intruder
        label = texts[odd([text for _, text in texts])][0]
        if not chat.choices:
            return Reply(data={"id": label})
        return Reply(text=label, probabilities={choice: 0.9 if choice == label else 0.02 for choice in chat.choices})
    answers = [(name, 0.9 if holds(description, text) else 0.1) for name, text in texts]
    if chat.choices:
        ((_, p),) = answers
        return Reply(probabilities={"yes": p, "no": 1 - p})
    return Reply(data={"answers": [{"id": name, "p": p} for name, p in reversed(answers)]})


def scored(scorer, examples, explanation, abilities=SINGLE, answer: Callable[[Chat], Reply] = judge, split="test"):
    """Returns the score of an explanation by a judge."""
    tasks = scorer.tasks(examples, split, {})
    replies = [answer(request) for request in scorer.requests(Trial(explanation, tasks, abilities))]
    found = scorer.judgements(Trial(explanation, tasks, abilities), replies)
    return scorer.score(tasks, found, examples.facts)
