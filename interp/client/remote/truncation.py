"""Prompts that a server cut to its context length without a word (llama.cpp, Ollama and many encoders do).

    tokens read < words + groups of signs sent        of Chinese, Japanese, Thai, ...: a quarter of the characters

A token of the usual vocabularies never spans two words, nor signs but for one before a word: so this many tokens are
the least that a prompt can be, whatever the tokenizer. Prompts of ours have 1.4 to 1.9 times as many (SmolLM2, Gemma 3,
BERT), so that they are told to be cut once about a third is gone; one cut by less goes unseen. Where a server counts
only what it has not read before (with other counts of its cache beside, or a few dozen in all), nothing is said.
"""

import re
from typing import Any

from interp.client import answers
from interp.client.requests import Chat, LogProb, Request
from interp.client.shapes import count, record
from sae.text.scripts import UNSPACED, WORD

LEAST_CONTEXT = 128
"""Tokens that a model reads at least: fewer are the count of something else."""
CHARS = 4
"""Characters of a script without blanks that a token holds at most, on average."""

_SHORTENED = re.compile(r"['\u2019](?:s|t|re|ve|m|ll|d)\b", re.IGNORECASE)  # which may be of one token with its word

_SIGNS = re.compile(r"[^\w\s]{2,}|[^\w\s](?![\w])")  # one before a word may be of one token with it


def least_tokens(text: str) -> int:
    """Returns how many tokens a text is at least."""
    words = WORD.findall(_SHORTENED.sub("", text))
    together = sum(len(word) for word in words if UNSPACED.match(word))
    apart = sum(len([*filter(None, word.split("_"))]) for word in words if not UNSPACED.match(word))
    return apart + together // CHARS + len(_SIGNS.findall(WORD.sub("a", text)))


def cut(request: Request, body: Any) -> str:
    """Returns what tells that a server has read less than it was sent, by its own count; "" where nothing does."""
    told, said = answers.usage(body), record(record(body).get("usage"))
    counts = {**said, **record(said.get("prompt_tokens_details"))}
    known = sum(count(value) or 0 for name, value in counts.items() if "cache" in name)  # however servers call it
    read = (told[0] if told else 0) + known
    if read < LEAST_CONTEXT:
        return ""
    sent = [content for _, content in request.messages] if isinstance(request, Chat) else []
    sent = sent or ([request.text] if isinstance(request, LogProb) else list(getattr(request, "texts", ())))
    least = sum(map(least_tokens, sent))
    if read >= least:
        return ""
    return (
        f"the server read {read:,} tokens of a prompt of at least {least:,}: raise its context length, or lower "
        "explainers.llm.max_prompt_chars"
    )
