"""Prompts that a server cut to its context length without a word (llama.cpp, Ollama and many encoders do).

    tokens read < words sent        words parted by blanks, and a quarter of the characters where no blank parts any

A token of the usual vocabularies never spans two words, and in Chinese, Japanese or Thai few characters: so this many
tokens are the least that a prompt can be, whatever the tokenizer. English has about 1.3 tokens a word, so a prompt is
told to be cut once a quarter of it is gone; one cut by less goes unseen. Where a server counts only what it has not
read before (`cached_tokens` beside, or a few dozen in all), nothing is said.
"""

from typing import Any

from interp.client import answers
from interp.client.requests import Chat, LogProb, Request
from sae.text.scripts import UNSPACED

LEAST_CONTEXT = 128
"""Tokens that a model reads at least: fewer are the count of something else."""
CHARS = 4
"""Characters of a script without blanks that a token holds at most, on average."""


def least_tokens(text: str) -> int:
    """Returns how many tokens a text is at least."""
    together = sum(len(run) for run in UNSPACED.findall(text))
    return len(UNSPACED.sub(" ", text).split()) + together // CHARS


def cut(request: Request, body: Any) -> str:
    """Returns what tells that a server has read less than it was sent, by its own count; "" where nothing does."""
    told = answers.usage(body)
    details = body["usage"].get("prompt_tokens_details") if told else None
    known = details.get("cached_tokens") if isinstance(details, dict) else 0
    read = (told[0] if told else 0) + (known if isinstance(known, int) else 0)
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
