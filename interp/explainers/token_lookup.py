"""A rule: the latent fires where certain tokens are. It is written from counts, and needs no language model.

    w_t = (firings on token t) / (occurrences of t + 1)     over the windows to explain
    score of a window = the largest w_t of its tokens, and it says "fires" where that is at least a threshold

It is the baseline of all explanations: what a list of tokens tells already. The threshold is where the balanced
accuracy over the windows to explain is largest, each of them scored with its own counts left out.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from interp.client.requests import Reply
from interp.explainers import Explainer
from interp.prompts.windows import spelled
from interp.records import Examples, Explanation, Window
from interp.scoring.metrics import best_threshold
from sae.base.settings import at_least

UNTOLD = "\ufffd"  # a token that is never more than a part of a character


@Explainer.register_subclass("token_lookup")
@dataclass(frozen=True)
class TokenLookup(Explainer):
    """Lists the tokens on which a latent fires."""

    named: int = 12
    """Tokens that the text names; the rule knows all."""

    needs_llm: ClassVar[bool] = False

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        at_least("explainers.token_lookup.named", self.named, 1)

    def explanations(self, examples: Examples, replies: Sequence[Reply]) -> list[Explanation]:
        """Returns the rule and a text that names its tokens; none without both active and silent windows."""
        counts = [_counts(item.window) for item in examples.explain]
        seen, fired = Counter[int](), Counter[int]()
        for own_seen, own_fired in counts:
            seen.update(own_seen)
            fired.update(own_fired)
        scores = [
            max(((fired[t] - own_fired[t]) / (seen[t] - own_seen[t] + 1) for t in own_seen), default=0.0)
            for own_seen, own_fired in counts
        ]
        threshold = best_threshold(scores, [float(item.active) for item in examples.explain])
        if threshold is None:
            return []
        weights = {token: n / (seen[token] + 1) for token, n in sorted(fired.items())}
        told = [token for token in weights if weights[token] >= threshold]
        told = sorted(told, key=lambda token: (-fired[token] * weights[token], token))[: self.named]
        names = _names(item.window for item in examples.explain)
        text = f"fires on the tokens {', '.join(spelled(names.get(token, UNTOLD)) for token in told)}"
        rule = {"tokens": {str(token): round(weight, 6) for token, weight in weights.items()}, "threshold": threshold}
        return [Explanation(examples.latent, text, "token_lookup", rule=rule)] if told else []


def rule_score(rule: Mapping[str, Any], window: Window, places: Collection[int] = ()) -> float:
    """Returns a number from 0 to 1, at least a half where a rule of `TokenLookup` says that the latent fires.

    It rises with the window's score. With `places`, the tokens at these alone are looked at.
    """
    tokens = [window.tokens[place] for place in places] if places else window.tokens
    weights, threshold = rule["tokens"], rule["threshold"]
    score = max(map(weights.__getitem__, weights.keys() & map(str, tokens)), default=0.0)
    if score >= threshold:
        return 0.5 + 0.5 * (score - threshold) / max(1e-9, 1 - threshold)
    return 0.5 * score / threshold


def _counts(window: Window) -> tuple[Counter[int], Counter[int]]:
    """Returns how often each token occurs in a window, and how often the latent fires on it."""
    fired = [token for token, value in zip(window.tokens, window.activations, strict=True) if value]
    return Counter(window.tokens), Counter(fired)


def _names(windows: Iterable[Window]) -> dict[int, str]:
    """Returns the text of every token that has one."""
    pairs = (pair for window in windows for pair in zip(window.tokens, window.pieces(), strict=True))
    return {token: piece for token, piece in pairs if piece}
