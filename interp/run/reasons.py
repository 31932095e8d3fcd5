"""How work on a latent ends, and why answers are missing: by kind, how many, and what was said the first time."""

from collections.abc import Iterable, Mapping
from typing import Any

from interp.client.requests import Reply

OK, NONE, PARTIAL, FAILED = "ok", "none", "partial", "failed"
DEAD, INSUFFICIENT, NOT_APPLICABLE = "dead", "insufficient", "n/a"
UNASKED = "unasked"  # of what has no row yet

LONGEST_CHARS = 200
WHY = {
    "timeout": "no answer in time",
    "connection": "the server could not be reached",
    "server_error": "the server failed",
    "rate_limit": "the server takes no more for now",
    "expired": "the batch ended before it was its turn",
    "refused": "the model or its server declines to answer",
    "length": "the answer did not end within the limit",
    "empty": "nothing was answered",
    "parse": "the answer is not in the form asked for",
    "no_mass": "less than half of the first token's probability lies on the answers asked for",
    "nothing": "no explanation is found in its windows",
    "unusable": "no answer holds an explanation, or only one that is too long",
}
"""What is said of a kind where nobody said more."""


def first_messages(replies: Iterable[Reply]) -> dict[str, str]:
    """Returns by kind of failure the first thing that was said of it, on one line, cut at 200 characters."""
    found: dict[str, str] = {}
    for reply in replies:
        if reply.failure and reply.detail:
            found.setdefault(reply.failure, " ".join(reply.detail.split())[:LONGEST_CHARS])
    return found


def counts_of(row: Mapping[str, Any]) -> dict[str, int]:
    """Returns by kind how many answers a row of a journal is missing.

    Of a score that is counted beside it; the row of an explanation tells it in its reason alone ("2 timeout, 1 parse").
    """
    if "score" in row:
        return dict(row["score"]["invalid"])
    if row["status"] == NONE and not row["reason"]:  # as older versions wrote it
        return {"nothing": 1}
    pairs = (part.partition(" ") for part in row["reason"].split(", ") if part)
    return {kind: int(n) for n, _, kind in pairs if n.isdecimal()}


def main_reason(row: Mapping[str, Any]) -> str:
    """Returns the kind that most answers of a row are missing by, so that every failed row counts once."""
    counts = counts_of(row)
    return min(counts, key=lambda kind: (-counts[kind], kind), default=row["reason"])


def told(counts: Mapping[str, int], messages: Mapping[str, str]) -> str:
    """Returns kinds with their numbers, the most frequent first, and what was said: "2 timeout (no answer in time)"."""
    ordered = sorted(counts, key=lambda kind: (-counts[kind], kind))
    said = {kind: said_of(kind, messages) for kind in ordered}
    return ", ".join(f"{counts[kind]:,} {kind}" + (f" ({said[kind]})" if said[kind] else "") for kind in ordered)


def why(status: str, reason: str | None) -> str:
    """Returns how work on a latent ended, and the reason, where that does not begin with it already."""
    return reason if reason and reason.startswith(status) else ": ".join(filter(None, (status, reason)))


def said_of(kind: str, messages: Mapping[str, str]) -> str:
    """Returns what was said of a kind the first time; where nothing was, what it means."""
    return messages.get(kind) or WHY.get(kind, "")
