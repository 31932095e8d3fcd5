"""A latent that says what comes next: the same word follows wherever it fires most.

It is taken for one only if that word rarely follows where the latent is silent, and if it is among the tokens that the
latent promotes, where these are known.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from interp.client.requests import Reply
from interp.explainers import Explainer
from interp.prompts.windows import spelled
from interp.records import Examples, Explanation, Item, Window
from sae.base.errors import ConfigError
from sae.text.scripts import SIGN, UNSPACED

LEAST_WINDOWS = 5
LEAST_PREFIX = 3  # characters of a word that a promoted token must have to be its beginning
RAREST = 0.5  # share of the windows in which the word follows where the latent is silent, of that where it fires
LONGEST = 4  # characters of what follows in a script that sets no blanks between words


@Explainer.register_subclass("next_token")
@dataclass(frozen=True)
class NextToken(Explainer):
    """Names the word that follows."""

    share: float = 0.6
    """Share of the active windows in which it follows."""

    needs_llm: ClassVar[bool] = False

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        if not 0 < self.share <= 1:
            raise ConfigError(f"explainers.next_token.share: {self.share} is not within (0, 1]")

    def explanations(self, examples: Examples, replies: Sequence[Reply]) -> list[Explanation]:
        """Returns the word; none where different ones follow."""
        active, silent = (_following(i for i in examples.explain if i.active == kind) for kind in (True, False))
        if len(active) < LEAST_WINDOWS:
            return []
        counts, others = (Counter(word for words in found for word in words) for found in (active, silent))

        def rank(word: str) -> tuple[bool, int, int]:
            often = counts[word] >= self.share * len(active)
            return often, len(word) if UNSPACED.match(word) else 0, counts[word]

        word = max(counts, key=rank)
        share, elsewhere = counts[word] / len(active), others[word] / max(1, len(silent))
        if share < self.share or elsewhere > RAREST * share or not _is_promoted(word, examples.facts.promoted):
            return []
        text = f"say {spelled(word)}: the text just before the word {spelled(word)}"
        return [Explanation(examples.latent, text, "next_token")]


def _following(items: Iterable[Item]) -> list[list[str]]:
    """Returns what follows the token about which each window is placed, without windows in which nothing does."""
    found = (_next_words(item.window) for item in items)
    return [words for words in found if words]


def _next_words(window: Window) -> list[str]:
    """Returns the word, in lower case, that begins after the peak; none where the window ends there.

    Of a script that sets no blanks between words: all that may be one, from its first character on.
    """
    match = SIGN.match(window.text[window.bounds[window.peak + 1] :].lstrip())
    word = match[0].casefold() if match else ""
    return (
        [word[:size] for size in range(1, min(LONGEST, len(word)) + 1)] if UNSPACED.match(word) else [word][: len(word)]
    )


def _is_promoted(word: str, promoted: Sequence[str]) -> bool:
    """Returns whether a word, or its beginning, is among the tokens that a latent promotes; so where none are known."""
    tokens = {token.strip().casefold() for token in promoted}
    if UNSPACED.match(word):  # whose tokens are single characters, or parts of them, or several words
        return not tokens or any("\ufffd" in t or word.startswith(t) or t.startswith(word) for t in tokens if t)
    return not tokens or word in tokens or any(word.startswith(t) for t in tokens if len(t) >= LEAST_PREFIX)
