"""What a model writes after a prompt, as it is or with latents edited, token by token."""

from collections.abc import Iterator, Sequence
from typing import Any

from sae.base.errors import ConfigError
from sae.base.settings import shown
from sae.lm import generation
from sae.lm.generation import Step
from sae.lm.models import LanguageModel
from sae.steering.edits import Edit
from sae.steering.hooks import Steering
from sae.text.chats import answerable
from sae.text.given import as_document
from sae.text.packing import added
from sae.text.tokenizing import encode_texts, special_ids


def generate(
    lm: LanguageModel,
    tokens: Sequence[int],
    steering: Steering | None = None,
    edits: Sequence[Edit] = (),
    **how: Any,
) -> Iterator[Step]:
    """Yields what a model writes after the tokens of a prompt, with latents edited; plain without edits.

    `how` is that of `sae.lm.generation.generate`: new_tokens, temperature, top_p, stop, seed, top, echo. Strengths of
    edits are values (`sae.steering.strengths.ready` makes them so).
    """
    during = steering.during(edits, len(tokens)) if steering and edits else None
    return generation.generate(lm, tokens, during, **how)


def prompt_tokens(lm: LanguageModel, prompt: Any, bos: str = "row", chat: bool = False) -> list[int]:
    """Returns the token ids of a prompt: of a text, of messages with role and content, or ids as they are.

    Messages are written by the model's own template, as is a text with `chat`, as what a user says. Before a text
    stands what stood there in training, of the policy `bos`. ConfigError for messages that the model has no template
    for, or that spell one of its special tokens.
    """
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    given, before = as_document("prompt", prompt), added(lm.tokenizer, bos)[0]
    if isinstance(given, str):
        (found,) = encode_texts(lm.tokenizer, [given])
        if not len(found) and not before:
            raise ConfigError(f"prompt: {shown(given[:60])} holds no tokens, so there is nothing to go on from")
        return [*before, *found.tolist()]
    messages = [one for one in given if isinstance(one, dict)]
    if not messages:
        ids = [one for one in given if isinstance(one, int)]
        outside = [token for token in ids if not 0 <= token < len(lm.tokenizer)]
        if outside:
            raise ConfigError(
                f"prompt: {outside[0]} is not the id of a token; allowed are 0 to {len(lm.tokenizer) - 1}"
            )
        return ids
    if not getattr(lm.tokenizer, "chat_template", None):
        raise ConfigError(f"prompt: the tokenizer of {lm.name} has no chat template; give plain text, without chat")
    try:
        ids = answerable(lm.tokenizer, messages, special_ids(lm.tokenizer))
    except ConfigError as error:
        raise ConfigError(str(error).replace("text.column", "prompt", 1)) from error
    return ids if ids[: len(before)] == before else [*before, *ids]
