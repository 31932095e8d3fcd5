"""Records of latents as a page has them: plain values, in which text of strangers is made visible, here and once.

A window is a list

    [text, {place: value}, section, start, peak, tokens]

whose text is that of its tokens with `CUT` between them, which no visible text has. Where tokens are parts of a
character and told with others, `tokens` says for every place which one of the window it is; else it is left out. What
several parts of a record show of the text is one window of its list `windows`, and these parts have its number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from interp.records import Facts, Measure, Seen, Window
from interp.view.record import Label, LatentRecord, LatentScore
from sae.base.visible import visible
from sae.pages.marks import shown_with

CUT = "\x7f"  # between the tokens of a window: one byte, also in JSON
LONGEST = 20_000  # characters of a text; a page is no place for more
LONGEST_LISTED, LONGEST_TOKEN = 1_000, 400  # of a text in the list of all latents, and of a token
LONGEST_NAME = 200


def shown_text(text: str | None, longest: int = LONGEST) -> str | None:
    """Returns text of strangers as a page has it, cut where it is longer than anybody reads."""
    if text is None:
        return None
    kept = visible(text[:longest])
    return kept if len(text) <= longest else f"{kept} ... ({len(text):,} characters)"


def shown_lines(text: str) -> str:
    """Returns text of strangers of several lines, as these."""
    return "\n".join(str(shown_text(line)) for line in text[:LONGEST].split("\n"))


def latent_of_page(record: LatentRecord) -> dict[str, Any]:
    """Returns all that a page tells of a latent."""
    windows = Windows()
    found: dict[str, Any] = {"latent": record.latent, "asked": record.asked, "status": record.status}
    found |= {"fired": record.fired, "tokens": record.tokens, "missing": shown_text(record.missing)}
    found["labels"] = [_label(label, windows) for label in record.labels]
    found["scores"] = [_score(score, windows) for score in record.scores]
    found["facts"] = _facts(record.facts) if record.facts else None
    for name, some in (("strongest", record.strongest), ("sampled", record.sampled)):
        found[name] = [[windows.number(one.window), one.decile, one.split] for one in some]
    found["windows"] = windows.made
    return found


@dataclass
class Windows:
    """The windows of a latent, each once."""

    made: list[list[Any]] = field(default_factory=list)
    _numbers: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def number(self, window: Window) -> int:
        """Returns the number of a window, which is added if it is not there yet."""
        key = window.start, window.text, window.activations
        if key not in self._numbers:
            self._numbers[key] = len(self.made)
            self.made.append(window_of_page(window))
        return self._numbers[key]


def window_of_page(window: Window) -> list[Any]:
    """Returns a window; a token that is a part of a character is told with the one that shows the whole of it, by the
    value that is largest by magnitude.
    """
    pieces = window.pieces()
    home = _homes(pieces)
    text = CUT.join(shown_text(piece, LONGEST_TOKEN) or "" for piece in pieces if piece)
    values = {place: exactly(value) for place, value in _largest(home, window.activations).items()}
    found = [text, values, window.section, window.start, home[window.peak] if window.peak < len(home) else 0]
    return found if all(pieces) else [*found, [place for place, piece in enumerate(pieces) if piece]]


def _homes(pieces: Sequence[str]) -> list[int]:
    """Returns for every token the place, among those that have a text, of the one that shows it."""
    if all(pieces):
        return list(range(len(pieces)))
    home = shown_with(pieces)
    places = {place: i for i, place in enumerate(sorted(set(home)))}
    return [places[at] for at in home]


def _largest(home: Sequence[int], values: Sequence[float]) -> dict[int, float]:
    """Returns by place the value that is largest by magnitude of what is shown there, without those that are 0."""
    found: dict[int, float] = {}
    for at, value in zip(home, values, strict=False):
        if value and abs(value) > abs(found.get(at, 0.0)):
            found[at] = value
    return found


def exactly(value: float) -> float:
    """Returns a float32 in as few digits as tell it from all others."""
    return float(str(np.float32(value)))


def figures(measure: Measure) -> list[float | None]:
    """Returns value, low and high, in six digits."""
    return [rounded(part) for part in (measure.value, measure.low, measure.high)]


def rounded(value: float | None) -> float | None:
    """Returns a number in six digits."""
    return None if value is None else float(f"{value:.6g}")


def _label(label: Label, windows: Windows) -> dict[str, Any]:
    texts = {name: shown_text(getattr(label, name)) for name in ("explainer", "text", "status", "reason")}
    texts["by"] = shown_text(label.by, LONGEST_NAME)
    return {**texts, "asked": _asked(label.asked), "scores": [_score(score, windows) for score in label.scores]}


def _score(score: LatentScore, windows: Windows) -> dict[str, Any]:
    names = ("scorer", "headline", "status", "reason")
    found: dict[str, Any] = {name: shown_text(getattr(score, name)) for name in names}
    found |= {"value": figures(score.measure), "null": figures(score.null), "lift": figures(score.lift), "n": score.n}
    found["coverage"] = rounded(score.coverage)
    found["measures"] = {name: figures(measure) for name, measure in score.measures.items()}
    found["judged"] = [_seen(seen, windows) for seen in score.windows]
    found["asked"] = _asked(score.asked)
    return found


def _seen(seen: Seen, windows: Windows) -> dict[str, Any]:
    """What is there of a task and its answer; what it has nothing of is left out."""
    found = {"windows": [windows.number(window) for window in seen.windows], "truth": rounded(seen.truth)}
    found |= {"tier": seen.tier, "decile": seen.decile, "value": rounded(seen.value), "miss": rounded(seen.miss)}
    told = {"reason": seen.reason, "text": seen.text, "clean": seen.clean}
    found |= {name: shown_text(text) for name, text in told.items() if text}
    if len(seen.windows) == 1:
        home = _homes(seen.windows[0].pieces())
        found |= {"marks": sorted({home[place] for place in seen.marks})} if seen.marks else {}
        levels = _largest(home, seen.levels)
        found |= {"levels": [levels.get(place, 0.0) for place in range(len(set(home)))]} if seen.levels else {}
    return found


def _asked(messages: Sequence[tuple[str, str]]) -> list[list[str | None]]:
    return [[shown_text(role), shown_lines(text)] for role, text in messages]


def _facts(facts: Facts) -> dict[str, Any]:
    lists = {name: [shown_text(token, LONGEST_TOKEN) for token in tokens] for name, tokens in _tokens(facts).items()}
    shares = [[shown_text(token, LONGEST_TOKEN), rounded(share)] for token, share in facts.top_tokens]
    near = [[latent, rounded(cosine)] for latent, cosine in facts.neighbors]
    found: dict[str, Any] = {
        "largest": exactly(facts.largest),
        "histogram": facts.histogram,
        "positions": facts.positions,
    }
    found["together"] = None if facts.together is None else [[*one] for one in facts.together]
    return {**found, **lists, "top_tokens": shares, "neighbors": near, "rates": facts.rates}


def _tokens(facts: Facts) -> dict[str, Sequence[str]]:
    return {"promoted": facts.promoted, "suppressed": facts.suppressed}
