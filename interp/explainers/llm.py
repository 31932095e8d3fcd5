"""An explanation by a language model, from active windows with marks and levels, and silent ones set against them.

The first candidate is drawn at temperature 0, the others at `temperature`: which is best is for the valid split to say.
A better one may be asked for with the windows of that split on which a judge went wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from interp.client.requests import Abilities, Chat, Reply, Request
from interp.explainers import Explainer
from interp.prompts.explaining import SCHEMA, correction_messages, explanation_messages
from interp.prompts.judging import Messages
from interp.prompts.windows import read_back
from interp.records import Examples, Explanation, Item, Judged
from sae.base.settings import at_least

TOKENS_OF_ANSWER = 256
LONGEST_WORDS, LONGEST_CHARS = 300, 2000  # what is longer is no explanation
UNDECIDED = 0.5


@Explainer.register_subclass("llm")
@dataclass(frozen=True)
class LanguageModelExplainer(Explainer):
    """Asks a language model."""

    candidates: int = 1
    """Explanations asked for."""
    shown: int = 20
    """Active windows shown, from the strongest to the weakest at equal steps."""
    silent: int = 10
    """Silent windows shown."""
    temperature: float = 0.7
    """Of all candidates but the first, and of corrections."""
    refine: bool = False
    """Whether the best explanation goes back once, with windows of the valid split on which a judge went wrong."""
    counterexamples: int = 5
    """Windows of each kind, overlooked and mistaken, that a correction is shown."""
    max_prompt_chars: int = 16_000
    """Fewer windows are shown where the prompt would be longer: about four characters are a token."""

    @property
    def refines(self) -> bool:
        """Returns whether it wants to be shown what its explanation got wrong."""
        return self.refine

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        for field, least in (("candidates", 1), ("shown", 1), ("silent", 0), ("counterexamples", 1)):
            at_least(f"explainers.llm.{field}", getattr(self, field), least)
        at_least("explainers.llm.temperature", self.temperature, 0)
        at_least("explainers.llm.max_prompt_chars", self.max_prompt_chars, 1000)

    def requests(self, examples: Examples, abilities: Abilities) -> list[Request]:
        """Returns one request a candidate; none where no active window is there to explain."""
        messages = self._asked(examples)
        if not messages:
            return []
        return [
            self._chat(messages, sample, 0.0 if sample == 0 else self.temperature) for sample in range(self.candidates)
        ]

    def explanations(self, examples: Examples, replies: Sequence[Reply]) -> list[Explanation]:
        """Returns the different explanations among the replies, without those that are empty or too long."""
        told = [reply.data.get("explanation") for reply in replies if reply.ok and isinstance(reply.data, dict)]
        texts = [" ".join(read_back(text).split()) for text in told if isinstance(text, str)]
        kept = dict.fromkeys(
            text for text in texts if text and len(text.split()) <= LONGEST_WORDS and len(text) <= LONGEST_CHARS
        )
        return [Explanation(examples.latent, text, "llm") for text in kept]

    def refined(
        self, examples: Examples, explanation: Explanation, judged: Sequence[Judged], abilities: Abilities
    ) -> list[Request]:
        """Returns one request, with the windows on which the judge went furthest wrong; none where it nowhere did."""
        answered = [(task, found.value) for task, found in judged if found.value is not None]
        wrong = sorted(
            (pair for pair in answered if (pair[1] >= UNDECIDED) != (pair[0].truth > 0)),
            key=lambda pair: -abs(pair[1] - pair[0].truth),
        )
        overlooked, mistaken = (
            [task.items[0] for task, _ in wrong if (task.truth > 0) == kind] for kind in (True, False)
        )
        asked = self._asked(examples)
        if not asked or not wrong:
            return []
        n = self.counterexamples
        return [
            self._chat(correction_messages(asked, explanation.text, overlooked[:n], mistaken[:n]), 0, self.temperature)
        ]

    def _asked(self, examples: Examples) -> Messages:
        """Returns the messages with as many windows as are wanted and the prompt has room for; none without any."""
        active, silent = ([item for item in examples.explain if item.active == kind] for kind in (True, False))
        if not active:
            return ()
        shown, against = min(self.shown, len(active)), min(self.silent, len(silent))
        while True:
            messages = explanation_messages(_spread(active, shown), silent[:against], examples.facts.promoted)
            if shown == 1 or sum(len(content) for _, content in messages) <= self.max_prompt_chars:
                return messages
            shown, against = max(1, shown * 4 // 5), against * 4 // 5

    def _chat(self, messages: Messages, sample: int, temperature: float) -> Chat:
        return Chat("explainer", messages, TOKENS_OF_ANSWER, temperature, schema=SCHEMA, sample=sample)


def _spread(items: list[Item], n: int) -> list[Item]:
    """Returns n of the items at equal steps, the first and the last among them."""
    return [items[round(place * (len(items) - 1) / max(1, n - 1))] for place in range(n)]
