"""Who may ask, how often and how much; and what every answer has in common.

    Answers   headers of every answer; what goes wrong is one line, and nothing of this machine
    Access    host, origin, pace, token, kind of content
    Bodies    a body of bounded size that arrives in bounded time; who goes away ends the work

A page of another site may send a request here, or have its own name lead to this address (DNS rebinding); a browser
says so in Origin, Sec-Fetch-Site and Host. Clients of the protocol say none of the first two.
"""

import asyncio
import hmac
import ipaddress
import json
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from interp.view.serving.limits import Limits
from interp.view.serving.refusing import Refused, told

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

COOKIE = "sae_view_"  # and the port: browsers keep one cookie of a name for all servers of a machine
LOGIN = "/login"
NO_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": NO_POLICY,  # unless the page has its own
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
OPEN = ("/", LOGIN)  # addresses that a link on another site may lead to
SCHEMES = ("http", "https")  # the second where a proxy speaks it for us
OWN_SITE = ("", "same-origin", "none")
MOST_CLIENTS = 4096
WRONG_TOKEN = 20  # requests that one with a wrong token counts for
ANYWHERE = ("0.0.0.0", "::")


@dataclass
class Access:
    """Who may ask: raises Refused for everybody else."""

    host: str
    """The address that is served."""
    limits: Limits
    token: str = ""
    """Without which nothing is answered, unless it is empty."""
    session: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    """What a browser keeps in place of the token, for as long as the server lives."""
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By client, how many requests it has left, and when that was so."""

    def check(self, scope: Message) -> None:
        """Raises Refused unless a request comes from where it should, not too often, and by who may."""
        headers = headers_of(scope)
        self._check_host(headers)
        self._check_origin(scope, headers)
        self.pace(scope)
        self._check_token(scope, headers)
        content = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and scope["path"] != LOGIN and content != "application/json":
            raise Refused(415, "content-type: only application/json is taken")

    def login(self, scope: Message, typed: str) -> str:
        """Returns the cookie of a browser in which the token was typed; Refused (401) if it is another."""
        if not self.token or not _same(typed, self.token):
            self.pace(scope, WRONG_TOKEN)
            raise Refused(401, "this is not the token in SAE_VIEW_TOKEN")
        return f"{_cookie_name(scope)}={self.session}; HttpOnly; SameSite=Strict; Path=/"

    def known(self, name: str) -> bool:
        """Returns whether this server is called by a name; of all addresses of a machine, by any but a domain's."""
        if name in ("localhost", "127.0.0.1", "::1", self.host.lower()):
            return True
        if self.host not in ANYWHERE:
            return False
        return _is_address(name) or name == socket.gethostname().lower()

    def pace(self, scope: Message, cost: float = 1.0) -> None:
        """Takes a request from those that a client has left; Refused (429) if there are none."""
        who, now, limits = client_of(scope), time.monotonic(), self.limits
        left, then = self._left.pop(who, (float(limits.burst), now))
        left = min(float(limits.burst), left + (now - then) * limits.a_second)
        self._left[who] = (max(left - cost, -cost), now)
        while len(self._left) > MOST_CLIENTS:
            del self._left[next(iter(self._left))]
        if left < cost:
            raise Refused(429, "too many requests; try again later", wait_s=(cost - left) / limits.a_second)

    def _check_host(self, headers: dict[str, str]) -> None:
        if not self.known(host_name(headers.get("host", ""))):
            raise Refused(403, "host: this server is not called so; open the address that it printed")

    def _check_origin(self, scope: Message, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in [f"{scheme}://{headers['host'].lower()}" for scheme in SCHEMES]:
            raise Refused(403, "origin: only the page of this server may ask it")
        own = headers.get("sec-fetch-site", "").lower() in OWN_SITE
        if not own and not (scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN):
            raise Refused(403, "origin: only the page of this server may ask it")

    def _check_token(self, scope: Message, headers: dict[str, str]) -> None:
        if not self.token or scope["path"] == LOGIN:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _same(given.strip(), self.token):
            return
        session = _cookie(headers, _cookie_name(scope))
        if _same(session, self.session):
            return
        if kind or session:
            self.pace(scope, WRONG_TOKEN)
        raise Refused(401, "the token in SAE_VIEW_TOKEN is needed, as Authorization: Bearer or by the form at /")


class Answers:
    """Adds the headers of every answer, and makes answers of what goes wrong: `say(scope, refused)` is the response."""

    def __init__(self, app: App, say: Callable[[Message, Refused], App], places: tuple[str, ...] = ()) -> None:
        self.app, self.say, self.places = app, say, places

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        begun = False

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                own = {name.decode("latin-1").lower() for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k not in own]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        try:
            await self.app(scope, receive, with_headers)
        except Exception as error:
            refused = told(error, self.places)
            if not begun:
                await self.say(scope, refused)(scope, receive, with_headers)


class Bodies:
    """Takes the body of a request whole, and gives it to the app, which is ended when the client goes away."""

    def __init__(self, app: App, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request that `Access` lets through."""
        self.access.check(scope)
        limits = self.access.limits
        try:
            async with asyncio.timeout(limits.body_seconds):
                body = await self._body(scope, receive)
        except TimeoutError:
            raise Refused(408, f"the request took more than {limits.body_seconds:g} s to arrive") from None
        gone = asyncio.ensure_future(receive())
        given = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await asyncio.shield(gone)

        work = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                if not task.done():
                    task.cancel()
        with suppress(asyncio.CancelledError):
            await work

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        most = self.access.limits.body
        too_large = Refused(413, f"the request has more than {most} bytes")
        headers = headers_of(scope)
        length = headers.get("content-length", "0")
        if "content-length" in headers and "transfer-encoding" in headers:
            raise Refused(400, "content-length: it is there beside transfer-encoding")
        if not length.isdecimal() or int(length[:20]) > most:
            raise too_large
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the client has gone")
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > most:
                raise too_large
        return b"".join(parts)


def headers_of(scope: Message) -> dict[str, str]:
    """Returns the headers of a request by their names in lower case; Refused (400) if one that decides comes twice."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in found and key in ("host", "origin", "authorization", "content-type", "content-length"):
            raise Refused(400, f"{key}: it is there twice")
        found[key] = value.decode("latin-1")
    return found


def client_of(scope: Message) -> str:
    """Returns the address that a request comes from."""
    return (scope.get("client") or ("",))[0]


def host_name(host: str) -> str:
    """Returns the name in a Host header, without its port, "" where it is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return ""
    plain = not (parts.path or parts.query or parts.fragment or parts.username or parts.password is not None)
    return (parts.hostname or "") if plain and "@" not in host else ""


def as_json(refused: Refused, error: Any) -> tuple[int, dict[str, str], bytes]:
    """Returns (status, headers, body) of an answer that tells an error."""
    headers = {"content-type": "application/json"}
    if refused.wait_s:
        headers["retry-after"] = str(max(1, round(refused.wait_s + 0.5)))
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return refused.status, headers, json.dumps({"error": error}).encode()


def _same(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), right.encode("utf-8", "surrogateescape"))


def _cookie_name(scope: Message) -> str:
    return f"{COOKIE}{(scope.get('server') or ('', ''))[1]}"


def _cookie(headers: dict[str, str], named: str) -> str:
    parts = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
    return next((value for name, _, value in parts if name == named), "")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
