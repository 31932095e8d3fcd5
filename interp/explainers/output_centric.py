"""What a latent promotes: the tokens whose logits its direction raises most (arXiv 2501.08319, VocabProj).

It tells what the latent does rather than where it fires, and is the better label of latents near the output. The
tokens are `Facts.promoted`; they are told as they are, and no language model is asked to put them into words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from interp.client.requests import Reply
from interp.explainers import Explainer
from interp.prompts.windows import spelled
from interp.records import Examples, Explanation
from sae.base.settings import at_least


@Explainer.register_subclass("output_centric")
@dataclass(frozen=True)
class OutputCentric(Explainer):
    """Lists the tokens that a latent promotes."""

    named: int = 10
    """Tokens that are named."""

    needs_llm: ClassVar[bool] = False

    def validate(self) -> None:
        """Raises ConfigError naming the field whose value is not allowed."""
        at_least("explainers.output_centric.named", self.named, 1)

    def explanations(self, examples: Examples, replies: Sequence[Reply]) -> list[Explanation]:
        """Returns the list; none where it is not known what the latent promotes."""
        told = list(dict.fromkeys(token for token in examples.facts.promoted if token.strip()))[: self.named]
        text = f"text before which these tokens are likely: {', '.join(spelled(token) for token in told)}"
        return [Explanation(examples.latent, text, "output_centric")] if told else []
