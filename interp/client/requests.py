"""What can be asked of a model, and what it answers: plain data, so that live, cached and batch calls are the same."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

ROLES = ("explainer", "judge", "reader", "encoder")

# Why an answer is missing. `retryable` ones may succeed when they are asked again.
RETRYABLE = ("timeout", "connection", "server_error", "rate_limit", "quota", "budget", "expired")
FINAL = ("refused", "length", "empty", "parse", "no_mass", "bad_request", "unsupported")

ROOM_FOR_THOUGHT = 2048
"""Tokens for a model that thinks though it was asked not to."""


@dataclass(frozen=True)
class Chat:
    """A conversation to be continued."""

    role: str
    """Who is asked: one of ROLES."""
    messages: tuple[tuple[str, str], ...]
    """(role, content) pairs: system, user, assistant."""
    max_tokens: int
    """Tokens of the answer proper; what a model thinks before comes on top."""
    temperature: float = 0.0
    choices: tuple[str, ...] = ()
    """Words of which the answer is one: their probabilities are read from the first token, and no text is parsed."""
    schema: str = ""
    """JSON schema that the answer must follow; the reply then holds `data`."""
    sample: int = 0
    """Tells repeated draws of one prompt apart, in the cache too."""


@dataclass(frozen=True)
class LogProb:
    """A text whose probabilities are wanted; only a model that shows those of its prompt can tell."""

    role: str
    text: str
    spans: tuple[tuple[int, int], ...]
    """Character ranges of `text`. Without `choices`: the log-probability of each, given all before it."""
    choices: tuple[str, ...] = ()
    """With these: the log-probability of each word's first token where each span starts, given all before it."""


@dataclass(frozen=True)
class Embed:
    """Texts of which vectors are wanted."""

    role: str
    texts: tuple[str, ...]


Request = Chat | LogProb | Embed


@dataclass(frozen=True)
class Reply:
    """An answer, or why there is none."""

    text: str = ""
    """Of Chat: the answer without what the model thought before it."""
    data: Any = None
    """Of Chat with a schema: the parsed answer, which follows it."""
    probabilities: dict[str, float] = field(default_factory=dict)
    """Of Chat with choices: by choice. They need not sum to 1: the rest is what the model would have said instead."""
    logprobs: tuple[tuple[float, ...], ...] = ()
    """Of LogProb: by span, its sum in nats (one number), or one number a choice."""
    counts: tuple[int, ...] = ()
    """Of LogProb without choices: by span, the number of the model's tokens in it."""
    vectors: tuple[tuple[float, ...], ...] = ()
    """Of Embed: one a text."""
    failure: str = ""
    """Empty, or one of RETRYABLE or FINAL."""
    detail: str = ""
    """What the server said of the failure, without secrets."""
    given_up: bool = False
    """Of a failure: whether it is the server's, which answered nobody any more, and says nothing of this question."""
    tokens_in: int = 0
    tokens_out: int = 0
    cached: bool = False
    """Whether it was answered earlier and cost nothing now."""

    @property
    def ok(self) -> bool:
        """Returns whether there is an answer."""
        return not self.failure

    @property
    def cut_off(self) -> str:
        """Returns in one line why no question gets an answer any more; "" where only this one failed, or none did.

        Work that such a reply belongs to has not failed: it is to be left open, and asking on is of no use.
        """
        if self.failure == "budget":
            return self.detail or "the budget is spent"
        if self.failure == "quota":
            return f"the quota is spent, or the key is refused ({self.detail})"
        return f"the server does not answer any more ({self.detail})" if self.given_up else ""


@dataclass(frozen=True)
class Abilities:
    """What a server was found to do; each way of asking has its own rung."""

    choices: bool = False
    """Whether log-probabilities of the first token come back."""
    top: int = 20
    """How many alternatives can be asked for at the first token."""
    structured: str = "plain"
    """How JSON is asked for: json_schema, json_object_schema, json_object or plain."""
    prompt_logprobs: bool = False
    """Whether the log-probabilities of a prompt come back: LogProb can be asked."""
    prompt_top: int = 0
    """How many alternatives to each token of a prompt come back: LogProb with choices needs some."""
    fits_texts: bool = False
    """Of an encoder: whether vectors depend on the texts asked about together (TF-IDF), so that all must be at once."""
    limit_name: str = "max_tokens"
    """The name of the limit on the answer: max_tokens or max_completion_tokens."""
    temperature: bool = True
    system: bool = True
    """Whether messages of the role system are taken; else they lead the first user message."""
    thinking_tokens: int = 0
    """Room for what the model thinks before it answers."""
    quiet: str = ""
    """JSON of the fields that keep a model from thinking; empty where it does not think, or cannot be kept from it."""
    ends: bool = True
    """Whether answers tell how they ended (finish_reason): then one that does not has broken off."""

    def lacking(self, request: Request) -> str:
        """Returns why a request cannot be asked, or ""."""
        if isinstance(request, LogProb) and not self.prompt_logprobs:
            return "does not tell the log-probabilities of a prompt"
        if isinstance(request, LogProb) and request.choices and not self.prompt_top:
            return "does not tell the alternatives to the tokens of a prompt"
        if isinstance(request, Chat) and request.choices and not self.choices:
            return "does not tell the log-probabilities of its first token"
        return ""


def cache_key(request: Request, model: str, where: str, abilities: Abilities) -> str:
    """Returns 64 hex digits that are equal for equal questions alone: what a cache may go by."""
    able = {name: value for name, value in vars(abilities).items() if name != "ends"}  # that says how it is read
    asked = {"kind": type(request).__name__, **vars(request), "abilities": able}
    text = json.dumps({"model": model, "where": where, "asked": asked}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
