"""Chats -> tokens, by the template that comes with the tokenizer, and whose words in them count.

Where the words of each message stand is found by writing the chat twice: with marks in place of the words it shows what
the template puts between them. Where the template changes words, so that the two do not agree, roles are refused.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from sae.base.errors import ConfigError
from sae.text.packing import context_only

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]
_MARK = re.compile("\ue000(\\d+)\ue001")  # characters for private use
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # what ShareGPT calls them


def as_chat(value: Any) -> Any:
    """Returns a cell as a list of messages with `role` and `content`, if it is a chat in a form that data sets have.

    That is one message alone, lists by key (as `datasets` may keep lists of records), `from` and `value` for role and
    content, and content in parts that are all text. Anything else is returned as it is.
    """
    if isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()):
        lists = all(isinstance(each, list) for each in value.values())
        value = (
            [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)] if lists else [value]
        )
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return [_message(message) for message in value]
    return value


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if {"from", "value"} <= message.keys() and "role" not in message:
        role, content = message["from"], message["value"]
        message = {key: message[key] for key in message.keys() - {"from", "value"}}
        message = {"role": _SPEAKERS.get(role, role), "content": content, **message}
    parts = message.get("content")
    if isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        message = {**message, "content": "".join(part["text"] for part in parts)}
    return message


def chat_tokens(
    tokenizer: "PreTrainedTokenizerBase", chat: Chat, roles: tuple[str, ...], special: set[int]
) -> Int[np.ndarray, "_n"]:
    """Returns the token ids of a chat; with `roles`, those outside of what these say are context only.

    It has none if a message spells a special token, which the template's text would turn into one. ConfigError if the
    tokenizer has no template, or it refuses the chat.
    """
    text = _written(tokenizer, chat)
    if _spells(tokenizer, chat, special):
        return np.zeros(0, np.int64)
    if roles and not tokenizer.is_fast:
        raise ConfigError("text.roles: this tokenizer does not say where its tokens stand in a text")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(roles), verbose=False)
    ids = np.array(found["input_ids"], np.int64)
    if not roles:
        return ids
    counts = np.zeros(len(text) + 1, np.int64)  # how many characters before each count
    for start, stop in _places(tokenizer, chat, roles, text):
        counts[start + 1 : stop + 1] = 1
    counts = counts.cumsum()
    starts, stops = np.array(found["offset_mapping"], np.int64).reshape(-1, 2).T
    return np.where(counts[stops] > counts[starts], ids, context_only(ids))


def answerable(tokenizer: "PreTrainedTokenizerBase", chat: Chat, special: set[int]) -> list[int]:
    """Returns the token ids of a chat up to where the model answers, or goes on with a last message of its own.

    ConfigError as of `chat_tokens`, and where a message spells a special token, which would be taken for one.
    """
    spelled = _spells(tokenizer, chat, special)
    if spelled:
        raise ConfigError(f"text.column: a message spells {spelled!r}, which this model takes for the end of one")
    goes_on = bool(chat) and chat[-1].get("role") == "assistant"
    text = _written(tokenizer, chat, add_generation_prompt=not goes_on, continue_final_message=goes_on)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def _spells(tokenizer: "PreTrainedTokenizerBase", chat: Chat, special: set[int]) -> str:
    """Returns a special token that the messages of a chat spell, "" if they spell none."""
    text = str(chat)
    return next((token for token in tokenizer.convert_ids_to_tokens(sorted(special)) if token in text), "")


def _written(tokenizer: "PreTrainedTokenizerBase", chat: Chat, **how: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"text.column: it holds chats, and the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat "
            "template; name a column of text, or a model that was trained on chats"
        )
    wrong = next((message for message in chat if not {"role", "content"} <= message.keys()), None)
    if wrong is not None:
        raise ConfigError(f"text.column: a message has {', '.join(wrong) or 'nothing'}; it needs role and content")
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **how))
    except Exception as error:  # a template is a program, and says in its own words what it does not take
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"text.column: the model's chat template does not take a chat of {', '.join(str(m['role']) for m in chat)} "
            f"({reason})"
        ) from error


def _places(
    tokenizer: "PreTrainedTokenizerBase", chat: Chat, roles: tuple[str, ...], text: str
) -> list[tuple[int, int]]:
    """Returns where in the written chat the words of these roles begin and end."""
    if any(isinstance(message["content"], list) for message in chat):
        raise ConfigError("text.roles: messages of several parts are not told apart; leave it empty")
    marked = [
        {**message, "content": f"\ue000{number}\ue001"} if message["content"] else message  # a call of a tool has none
        for number, message in enumerate(chat)
    ]
    pattern, between, said = "", _MARK.split(_written(tokenizer, marked)), []
    for place, part in enumerate(between):
        if place % 2:
            words = chat[int(part)]["content"]
            said.append(chat[int(part)]["role"])
            pattern += f"({re.escape(words)}|{re.escape(words.strip())})"
        else:
            pattern += re.escape(part)
    match = re.fullmatch(pattern, text)
    if match is None:
        raise ConfigError(
            "text.roles: the model's chat template changes what messages say, so that roles cannot be told apart in "
            "it; leave text.roles empty"
        )
    return [match.span(group) for group, role in enumerate(said, 1) if role in roles]
