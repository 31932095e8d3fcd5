"""A latent that says what comes next: the same word follows wherever it fires most.

It is taken for one only if that word rarely follows where the latent is silent, and if it is among the tokens that the
latent promotes, where these are known.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from interp.client.requests import Reply
from interp.explainers import Explainer
from interp.prompts.windows import quoted
from interp.records import Examples, Explanation, Item, Window
from sae.base.errors import ConfigError

LEAST_WINDOWS = 5
LEAST_PREFIX = 3  # characters of a word that a promoted token must have to be its beginning
RAREST = 0.5  # share of the windows in which the word follows where the latent is silent, of that where it fires
_WORD = re.compile(r"\s*(\w+|[^\w\s])")


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
        if active.total() < LEAST_WINDOWS:
            return []
        word, n = active.most_common(1)[0]
        share, elsewhere = n / active.total(), silent[word] / max(1, silent.total())
        promoted = {token.strip().casefold() for token in examples.facts.promoted}
        said = not promoted or word in promoted or any(word.startswith(t) for t in promoted if len(t) >= LEAST_PREFIX)
        if share < self.share or elsewhere > RAREST * share or not said:
            return []
        text = f"say {quoted(word)}: the text just before the word {quoted(word)}"
        return [Explanation(examples.latent, text, "next_token")]


def _following(items: Iterable[Item]) -> Counter[str]:
    """Returns how often each word follows the token about which a window is placed."""
    return Counter(word for word in (_next_word(item.window) for item in items) if word)


def _next_word(window: Window) -> str:
    """Returns the word, in lower case, that begins after the peak; "" where the window ends there."""
    match = _WORD.match(window.text, window.bounds[window.peak + 1])
    return match[1].casefold() if match else ""
