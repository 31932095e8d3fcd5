"""What a message says: the answer, what was thought before it, and a refusal, however a server keeps them apart.

The content is a text, or a list of parts of several kinds. What was thought is a part of its own, a field of its own,
or stands between marks in front of the answer; some servers keep the opening mark to themselves.
"""

import re
from dataclasses import dataclass
from typing import Any

from interp.client.shapes import record, told

FIELDS = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks")
"""Fields of a message that hold what was thought."""
_TEXTS = ("refusal", "text", "value", "thinking", "reasoning", "summary", "content")
"""Fields of a part that hold its text, or more parts."""
_MARKS = (
    *((f"<{name}>", f"</{name}>") for name in (r"(?:\w+[:_])?think(?:ing)?", "thoughts?", "reason(?:ing)?")),
    (r"\[THINK\]", r"\[/THINK\]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    (r"<\|(?:begin_of_thought|START_THINKING)\|>", r"<\|(?:end_of_thought|END_THINKING)\|>"),
    (r"<\|channel\|>analysis<\|message\|>", r"<\|channel\|>final<\|message\|>"),
    (r"<\|channel>thought", r"<channel\|>"),
)
_PAIRS = [(re.compile(rf"\s*(?:{opening})", re.I), re.compile(closing, re.I)) for opening, closing in _MARKS]
_OPENING, _CLOSING = ("|".join(marks) for marks in zip(*_MARKS, strict=True))
_OPEN_FIRST = re.compile(rf"\A\s*(?:{_OPENING})", re.I)
_OPEN_LAST = re.compile(rf"(?:{_OPENING})\s*\Z", re.I)
_CLOSE = re.compile(_CLOSING, re.I)
_CLOSE_ALONE = re.compile(rf"(?:\A|\n)[ \t]*(?:{_CLOSING})[ \t]*(?:\n|\Z)", re.I)


@dataclass(frozen=True)
class Said:
    """A message, taken apart."""

    text: str = ""
    thinking: str = ""
    """What stands apart from the text; the text itself may begin with more of it, between marks."""
    where: str = ""
    """What held it: the name of a field."""
    refusal: str = ""


def said_in(message: Any) -> Said:
    """Returns what a message says."""
    message = record(message)
    content = message.get("content")
    parts: dict[str, list[str]] = {"text": [], "thinking": [], "refusal": []}
    for part in content if isinstance(content, list) else [content]:
        parts[_kind(part)].append(_flat(part))
    where, thinking = "content", "".join(parts["thinking"])
    for name in FIELDS:
        if not thinking.strip():
            where, thinking = name, _flat(message.get(name))
    refusal = "".join(parts["refusal"]) or message.get("refusal")
    return Said(told("".join(parts["text"])), told(thinking), where, told(refusal) if refusal else "")


def thought(text: str, thinks: bool) -> str | None:
    """Returns an answer without what was thought before it; None where the thinking does not end.

    Args:
        text: the answer.
        thinks: whether the model is known to think: then any closing mark ends what was thought. Else one whose opening
            is nowhere must stand alone on its line.
    """
    opened = False
    while closing := next((closing for opening, closing in _PAIRS if opening.match(text)), None):
        opened, parts = True, closing.split(text, maxsplit=1)
        if len(parts) == 1:
            return None
        text = parts[1]
    return text if opened else (_CLOSE if thinks else _CLOSE_ALONE).split(text, maxsplit=1)[-1]


def ends_in_thought(prompt: str) -> bool:
    """Returns whether a prompt leaves the answer to begin within a thought."""
    return _OPEN_LAST.search(prompt) is not None


def shows_thought(said: Said) -> bool:
    """Returns whether a message holds anything that was thought, or a mark of it."""
    return bool(said.thinking.strip()) or any(mark.search(said.text) for mark in (_OPEN_FIRST, _CLOSE))


def _kind(part: Any) -> str:
    """Returns what a part of the content is."""
    name = told(record(part).get("type") or "text").lower()
    if "refusal" in name:
        return "refusal"
    return "thinking" if "think" in name or "reason" in name else "text"


def _flat(value: Any, depth: int = 4) -> str:
    """Returns the text of a part, which some servers nest."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and depth:
        return "".join(_flat(part, depth - 1) for part in value)
    held = next((record(value)[name] for name in _TEXTS if record(value).get(name)), None)
    return _flat(held, depth - 1) if depth else ""
