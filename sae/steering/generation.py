"""What a model writes after a prompt, as it is or with latents edited, token by token."""

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

from sae.base.arguments import wrong
from sae.base.errors import ConfigError
from sae.base.settings import shown
from sae.lm import generation
from sae.lm.generation import Step
from sae.lm.models import LanguageModel
from sae.steering.edits import Edit
from sae.steering.hooks import Steering
from sae.text.chats import answerable, as_chat
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
    given = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # arrays and tensors
    if isinstance(given, list | tuple) and given and all(map(_is_id, given)):
        outside = [token for token in given if not 0 <= token < len(lm.tokenizer)]
        if outside:
            raise ConfigError(
                f"prompt: {outside[0]} is not the id of a token; allowed are 0 to {len(lm.tokenizer) - 1}"
            )
        return [int(token) for token in given]
    if not isinstance(prompt, str) and not _is_chat(prompt):
        raise wrong("prompt", prompt, "one text, one chat (messages with role and content) or token ids")
    before = added(lm.tokenizer, bos)[0]
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = as_chat(prompt)
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        if not getattr(lm.tokenizer, "chat_template", None):
            raise ConfigError(f"prompt: the tokenizer of {lm.name} has no chat template; give plain text, without chat")
        try:
            ids = answerable(lm.tokenizer, messages, special_ids(lm.tokenizer))
        except ConfigError as error:
            raise ConfigError(str(error).replace("text.column", "prompt", 1)) from error
        return ids if ids[: len(before)] == before else [*before, *ids]
    (found,) = encode_texts(lm.tokenizer, [prompt])
    if not len(found) and not before:
        raise ConfigError(f"prompt: {shown(prompt[:60])} holds no tokens, so there is nothing to go on from")
    return [*before, *found.tolist()]


def _is_id(token: Any) -> bool:
    return isinstance(token, Integral) and not isinstance(token, bool)


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(one, Mapping) for one in prompt)
