"""How much one server takes: of a request, of a client, and of all at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What is refused beyond, in one line."""

    body: int = 1 << 20
    """Bytes of a request."""
    text: int = 20_000
    """Characters of one text."""
    tokens: int = 4096
    """Tokens of one text, below what the model takes."""
    prompts: int = 128
    """Texts of one request."""
    new_tokens: int = 1024
    """Tokens that are written for one text."""
    choices: int = 16
    """Answers to one text."""
    stops: int = 4
    """Texts at which an answer ends."""
    edits: int = 16
    """Latents changed at once."""
    label: int = 10_000
    """Characters of an edited label: what `--explanations` takes."""
    query: int = 500
    """Characters that are searched for."""
    open: int = 8
    """Requests that the model works on at once, in turns: each keeps its keys and values."""
    waiting: int = 64
    """Requests that wait for their first turn."""
    seconds: float = 300.0
    """How long a request may take, waiting included."""
    body_seconds: float = 20.0
    """How long a request may take to arrive."""
    burst: int = 200
    """Requests that a client may make at once."""
    a_second: float = 50.0
    """Requests that it may make each second from then on."""
    connections: int = 200
