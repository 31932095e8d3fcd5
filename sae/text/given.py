"""What people hand over in Python as text: one or several texts, chats, or token ids, in all that holds numbers."""

from collections.abc import Mapping
from typing import Any

from sae.base.arguments import described, plain, wrong
from sae.base.errors import ConfigError
from sae.text.chats import Chat, as_chat

DOCUMENT = "a text, a chat (messages with role and content), token ids"


def as_documents(argument: str, value: Any) -> list[str | Chat | list[int]]:
    """Returns what was given as a list of texts, chats and lists of token ids.

    Ids stand in lists, tuples, ranges, arrays, tensors, or in what a tokenizer returns, where padding is left out.
    TypeError, which names the argument, for anything else.
    """
    if isinstance(value, Mapping) and "input_ids" in value:  # what a tokenizer returns
        ids = plain(value["input_ids"])
        value = _unpadded(ids, plain(value["attention_mask"])) if "attention_mask" in value else ids
    return _documents(argument, plain(value))


def as_document(argument: str, value: Any) -> str | Chat | list[int]:
    """Returns what was given as one text, chat or list of token ids; a batch of one is one."""
    found = as_documents(argument, value)
    if not found:
        raise ConfigError(f"{argument}: there are no tokens in {described(value)}")
    if len(found) != 1:
        raise wrong(argument, value, f"one, not {len(found)}: {DOCUMENT}")
    return found[0]


def _documents(argument: str, value: Any) -> list[str | Chat | list[int]]:
    value = as_chat(value)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong(argument, value, f"{DOCUMENT}, or a list of one of them")
    if value and isinstance(value[0], dict):
        return [value]
    if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return [value] if value else []
    return [document for item in value for document in _documents(argument, item)]


def _unpadded(ids: list[Any], there: list[Any]) -> list[Any]:
    return [_unpadded(i, k) if isinstance(i, list) else i for i, k in zip(ids, there, strict=True) if k]
