"""What a call to a server came to, and what each thing that can go wrong is called.

Only the outcome's JSON goes on to be read as an answer (`interp.client.answers`); here is all that is known without
knowing the question.
"""

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

from interp.client.answers import fault_of
from interp.client.bodies import CHAT, EMBEDDINGS
from interp.client.shapes import count, first, listed, record, told

DETAIL_CHARS = 200
# What looks like a key: those of OpenAI and others, also half masked, those of Hugging Face, and any bearer's.
_KEYS = re.compile(r"(?:\b(?:sk|pk|rk|hf|gsk|key)[-_]|AIza)[\w*.\-]{6,}|(?<=Bearer )\S+", re.IGNORECASE)
_OUT_OF_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_AGAIN = (408, 409, 425, 429)
_TOO_LONG = re.compile(r"HTTP 4(?:13|14|31)|context|too (?:long|large|many (?:\w+ )?tokens)", re.IGNORECASE)


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
    doubtful: bool = False
    """Of a refusal: whether it may be of this question or of all, which a small one tells. Firewalls refuse texts by
    the status of a refused key (403), and some servers a key or an account by that of a bad question (400)."""
    wait_s: float | None = None
    """How long the server wants to be left alone."""
    paid: bool = False
    """Whether the server may have done the work although no answer came back."""
    given_up: bool = False
    """Whether the server answers nobody any more."""

    def settled(self, of_all: bool) -> "Outcome":
        """Returns this failure once it is known whether all questions meet it."""
        if self.doubtful and of_all:
            return replace(self, failure="quota" if self.stop else "server_error", given_up=True)
        if self.doubtful and self.stop:
            return replace(self, failure="refused", stop=False)
        return replace(self, given_up=of_all)


def scrub(text: str, secrets: Iterable[str] = ()) -> str:
    """Returns a server's message as one line of at most 200 characters, without keys or what looks like one."""
    for secret in secrets:
        if len(secret) >= 4:
            text = text.replace(secret, "***")
    line = " ".join(_KEYS.sub("***", told(text)).split())
    return line if len(line) <= DETAIL_CHARS else line[: DETAIL_CHARS - 3] + "..."


def outcome_of_status(status: int, text: str, headers: Mapping[str, str], secrets: Iterable[str] = ()) -> Outcome:
    """Returns the outcome of an answer whose status is no success."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = text
    said = first(said) or said  # Gemini's are lists
    return outcome_of_error(status, record(said).get("error") or said, headers, secrets)


def outcome_of_error(status: int, error: Any, headers: Mapping[str, str], secrets: Iterable[str] = ()) -> Outcome:
    """Returns the outcome of an error, in any of the shapes that servers give it."""
    code, message = _error(error)
    detail = scrub(f"HTTP {status}: {message}", secrets)
    wait_s = retry_after(headers)
    if status in (401, 402) or code in _OUT_OF_MONEY:
        return Outcome(failure="quota", detail=detail, status=status, stop=True)
    if code in ("content_filter", "content_policy_violation") or (status == 403 and "flagged" in message.lower()):
        return Outcome(failure="refused", detail=detail, status=status)
    if status == 403:
        return Outcome(failure="quota", detail=detail, status=status, stop=True, doubtful=True)
    if status in (404, 405, 501):  # the server, not the question, is at fault: another day it may answer
        return Outcome(failure="server_error", detail=detail, status=status, doubtful=True)
    if status in _AGAIN or status >= 500:
        failure = {429: "rate_limit", 408: "timeout", 504: "timeout"}.get(status, "server_error")
        return Outcome(failure=failure, detail=detail, status=status, again=True, wait_s=wait_s)
    if 300 <= status < 400:
        return Outcome(failure="server_error", detail=detail, status=status)
    return Outcome(failure="bad_request", detail=detail, status=status, doubtful=not _TOO_LONG.search(detail))


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
    """Returns the outcome of a parsed answer whose status is 200: an error may stand in it, or in its choice."""
    error = record(body).get("error") or first(record(body).get("choices")).get("error")
    code = record(error).get("code")
    code = count(int(code) if isinstance(code, str) and re.fullmatch("[45][0-9]{2}", code) else code) or 0
    if error and not record(body).get("error"):  # whatever it is, it broke an answer that had begun
        code = code if code == 429 else max(code, 500)
    if error:
        return outcome_of_error(code if 400 <= code < 600 else 500, error, {}, secrets)
    if path == EMBEDDINGS:
        fault = "" if listed(record(body).get("data")) else f"the server's answer is empty: {told(body)}"
    else:
        fault = fault_of(body, path == CHAT)
    if fault:
        return Outcome(failure="server_error", detail=scrub(fault, secrets), status=200, again=True)
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
    except (ValueError, TypeError, OverflowError):
        return None


def _error(error: Any) -> tuple[str, str]:
    """Returns (code, message) of an error."""
    known = [told(record(error).get(name)) for name in ("code", "type") if record(error).get(name)]
    code = next((name for name in known if name in _OUT_OF_MONEY), known[0] if known else "")
    return code, told(record(error).get("message") or record(error).get("detail") or error)
