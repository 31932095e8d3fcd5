"""A latent of one word: no language model is needed to say so.

Its activation lies on few tokens, and most of that on forms of one word (cases and spaces aside).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from interp.client.requests import Reply
from interp.explainers import Explainer
from interp.prompts.windows import spelled
from interp.records import Examples, Explanation
from sae.base.errors import ConfigError
from sae.base.settings import at_least

T = TypeVar("T")


@Explainer.register_subclass("single_token")
@dataclass(frozen=True)
class SingleToken(Explainer):
    """Names the one word on which a latent fires."""

    most_tokens: int = 20
    """Different tokens that hold `share` of the activation."""
    share: float = 0.8
    """Share of the activation that they hold."""
    dominance: float = 0.7
    """Share of the activation that forms of the one word hold."""

    needs_llm: ClassVar[bool] = False

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        at_least("explainers.single_token.most_tokens", self.most_tokens, 1)
        for field in ("share", "dominance"):
            if not 0 < getattr(self, field) <= 1:
                raise ConfigError(f"explainers.single_token.{field}: {getattr(self, field)} is not within (0, 1]")

    def explanations(self, examples: Examples, replies: Sequence[Reply]) -> list[Explanation]:
        """Returns the word; none where the latent fires on several."""
        fired = [
            (token, piece.strip() or piece, abs(value))
            for window in (item.window for item in examples.explain)
            for token, piece, value in zip(window.tokens, window.pieces(), window.activations, strict=True)
            if value
        ]
        total = sum(mass for *_, mass in fired)
        by_token = _largest((token, mass) for token, _, mass in fired)
        by_word = _largest((piece.casefold(), mass) for _, piece, mass in fired)
        if not fired or sum(mass for _, mass in by_token[: self.most_tokens]) < self.share * total:
            return []
        word, mass = by_word[0]
        if not word or mass < self.dominance * total:
            return []
        form, _ = _largest((piece, mass) for _, piece, mass in fired if piece.casefold() == word)[0]
        return [Explanation(examples.latent, f"the word {spelled(form)}", "single_token")]


def _largest(parts: Iterable[tuple[T, float]]) -> list[tuple[T, float]]:
    """Returns the sum of every name's numbers, the largest first."""
    sums: dict[T, float] = {}
    for name, number in parts:
        sums[name] = sums.get(name, 0.0) + number
    return sorted(sums.items(), key=lambda pair: -pair[1])
