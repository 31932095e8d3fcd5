"""What a call to a server came to, and what each thing that can go wrong is called.

Only the outcome's JSON goes on to be read as an answer (`interp.client.answers`); here is all that is known without
knowing the question.
"""

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

DETAIL_CHARS = 200
# What looks like a key: those of OpenAI and others, also half masked, those of Hugging Face, and any bearer's.
_KEYS = re.compile(r"(?:\b(?:sk|pk|rk|hf|gsk|key)[-_]|AIza)[\w*.\-]{6,}|(?<=Bearer )\S+", re.IGNORECASE)
_OUT_OF_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_AGAIN = (408, 409, 425, 429)


@dataclass(frozen=True)
class Outcome:
    """What one call came to: the server's JSON, or why there is none."""

    body: Any = None
    """The parsed answer; None where there is none."""
    failure: str = ""
    """Empty, or one of `interp.client.requests`' RETRYABLE or FINAL."""
    detail: str = ""
    status: int = 0
    """The HTTP status; 0 where no answer came."""
    again: bool = False
    """Whether another try may succeed."""
    stop: bool = False
    """Whether the account or the key is refused, so that nothing more need be sent."""
    wait_s: float | None = None
    """How long the server wants to be left alone."""
    paid: bool = False
    """Whether the server may have done the work although no answer came back."""
    given_up: bool = False
    """Whether the server answers nobody any more."""


def scrub(text: str, secrets: Iterable[str] = ()) -> str:
    """Returns a server's message as one line of at most 200 characters, without keys or what looks like one."""
    for secret in secrets:
        if len(secret) >= 4:
            text = text.replace(secret, "***")
    line = " ".join(_KEYS.sub("***", text).split())
    return line if len(line) <= DETAIL_CHARS else line[: DETAIL_CHARS - 3] + "..."


def outcome_of_status(status: int, text: str, headers: Mapping[str, str], secrets: Iterable[str] = ()) -> Outcome:
    """Returns the outcome of an answer whose status is no success."""
    code, message = _error(text)
    detail = scrub(f"HTTP {status}: {message}", secrets)
    wait_s = retry_after(headers)
    if status in (401, 402) or code in _OUT_OF_MONEY:
        return Outcome(failure="quota", detail=detail, status=status, stop=True)
    if code in ("content_filter", "content_policy_violation") or (status == 403 and "flagged" in message.lower()):
        return Outcome(failure="refused", detail=detail, status=status)
    if status == 403:
        return Outcome(failure="quota", detail=detail, status=status, stop=True)
    if status in (404, 405, 501):  # the server, not the question, is at fault: another day it may answer
        return Outcome(failure="server_error", detail=detail, status=status)
    if status in _AGAIN or status >= 500:
        failure = {429: "rate_limit", 408: "timeout", 504: "timeout"}.get(status, "server_error")
        return Outcome(failure=failure, detail=detail, status=status, again=True, wait_s=wait_s)
    if 300 <= status < 400:
        return Outcome(failure="server_error", detail=detail, status=status)
    return Outcome(failure="bad_request", detail=detail, status=status)


def outcome_of_text(text: str, path: str, secrets: Iterable[str] = ()) -> Outcome:
    """Returns the outcome of an answer whose status is 200: not all of them hold one."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        said = "a web page" if text.lstrip()[:1] == "<" else "what is no JSON"
        detail = scrub(f"the server answered with {said}: {text}", secrets)
        return Outcome(failure="server_error", detail=detail, status=200, again=True)
    return outcome_of_body(body, path, secrets)


def outcome_of_body(body: Any, path: str, secrets: Iterable[str] = ()) -> Outcome:
    """Returns the outcome of a parsed answer whose status is 200."""
    if isinstance(body, dict) and body.get("error"):
        error = body["error"]
        code = error.get("code") if isinstance(error, dict) else None
        return outcome_of_status(code if isinstance(code, int) and code >= 400 else 500, json.dumps(body), {}, secrets)
    listed = body.get("data" if path == "/embeddings" else "choices") if isinstance(body, dict) else None
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
        detail = scrub(f"the server's answer is empty: {json.dumps(body)}", secrets)
        return Outcome(failure="server_error", detail=detail, status=200, again=True)
    return Outcome(body=body, status=200)


def outcome_of_exception(error: Exception, secrets: Iterable[str] = ()) -> Outcome:
    """Returns the outcome of a call that the openai package or the clock gave up; raises what is no server's doing."""
    import openai

    cause = type(error.__cause__).__name__
    if isinstance(error, openai.APIStatusError):
        return outcome_of_status(error.status_code, error.response.text, error.response.headers, secrets)
    if isinstance(error, (TimeoutError, openai.APITimeoutError)) and cause != "ConnectTimeout":
        return Outcome(failure="timeout", detail="no answer in time", again=True, paid=True)
    if isinstance(error, json.JSONDecodeError):
        return Outcome(failure="server_error", detail="the server answered with what is no JSON", again=True, paid=True)
    if isinstance(error, (openai.APIConnectionError, TimeoutError)):
        reason = scrub(f"{cause}: {error.__cause__}" if error.__cause__ else str(error), secrets)
        return Outcome(failure="connection", detail=reason, again=True, paid=not cause.startswith("Connect"))
    raise error


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds that Retry-After (a number or a date) asks for; None where it says nothing of use."""
    text = headers.get("retry-after") or ""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _error(text: str) -> tuple[str, str]:
    """Returns (code, message) of an error body, in any of the shapes that servers give it."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return "", text
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return "", str(error)
    known = [str(error.get(name)) for name in ("code", "type") if error.get(name)]
    code = next((name for name in known if name in _OUT_OF_MONEY), known[0] if known else "")
    return code, str(error.get("message") or error.get("detail") or text)
