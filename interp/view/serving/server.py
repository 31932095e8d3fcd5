"""A socket, uvicorn on it, and how both end.

The address is bound before anything is loaded, so that one in use is told at once; it is printed when all is loaded.
"""

import asyncio
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from interp.view.serving.guards import App
from interp.view.serving.limits import Limits
from interp.view.serving.refusing import one_line
from interp.view.serving.turns import Turns
from sae.base.errors import ConfigError

log = logging.getLogger(__name__)

TOKEN = "SAE_VIEW_TOKEN"
LEAST_TOKEN = 16
TRIED_PORTS = 50
HEADER_SECONDS = 10.0
MOST_HEADER = 32 * 1024
GRACE_S = 5


def checked_token(host: str) -> str:
    """Returns the token in the environment, "" if there is none; ConfigError where it is needed, or a weak one."""
    token = os.environ.get(TOKEN, "")
    if token and (len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError(f"{TOKEN}: it needs {LEAST_TOKEN} or more ASCII characters without spaces")
    if not token and not is_loopback(host):
        raise ConfigError(
            f"host: {host} can be reached by others; set {TOKEN} in the environment to a long random text that they "
            "must know, or leave --host out"
        )
    return token


def is_loopback(host: str) -> bool:
    """Returns whether an address is of this machine alone; ConfigError if it is none."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host: {host!r} is no address of this machine; 127.0.0.1 is") from error
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def listening(host: str, port: int) -> socket.socket:
    """Returns a socket that listens; ConfigError in one line if the port is in use, with one that is free."""
    try:
        return _bound(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = f"--port {_free(host, port)} is free" if _free(host, port) else "choose another --port"
            raise ConfigError(f"port: {port} is in use on {host}; {free}") from error
        reason = error.strerror or str(error)
        what = "port" if error.errno == errno.EACCES else "host"
        raise ConfigError(f"{what}: {host} port {port} cannot be served ({reason}); choose another") from error


def address(host: str, sock: socket.socket) -> str:
    """Returns the address that a browser opens."""
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{sock.getsockname()[1]}/"


def serve(app: App, sock: socket.socket, turns: Turns, limits: Limits, ready: Callable[[], None]) -> None:
    """Serves an application until SIGINT or SIGTERM, which end all work at its next step.

    Args:
        app: what answers.
        sock: where it listens.
        turns: the work that is under way.
        limits: how much is taken.
        ready: called once requests are answered.
    """
    try:
        _Server(configured(app, limits), turns, ready).run(sockets=[sock])
    except KeyboardInterrupt:
        pass
    finally:
        turns.end()
        turns.join(GRACE_S)


def configured(app: App, limits: Limits) -> uvicorn.Config:
    """Returns how uvicorn serves an application: quietly, in HTTP/1.1 alone, and believing no proxy."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # ours tells what goes wrong
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=_Patient,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=GRACE_S,
        h11_max_incomplete_event_size=MOST_HEADER,
    )


class _Server(uvicorn.Server):
    """Ends the model's work with itself."""

    def __init__(self, config: uvicorn.Config, turns: Turns, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.turns, self.ready = turns, ready
        self.told: set[str] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().set_exception_handler(self._amiss)
        self.ready()

    def _amiss(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Tells once of each thing that goes wrong outside of requests, such as too many connections for the machine:
        asyncio would with every try, and with the places of this machine. Of what is tried again at the end, nothing.
        """
        error = context.get("exception")
        reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
        line = one_line(f"{context['message']} ({reason})")
        if line not in self.told and not self.should_exit:
            self.told.add(line)
            log.warning("%s", line)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self.turns.end()


class _Patient(H11Protocol):
    """Closes a connection whose request does not arrive, byte by byte as it may: uvicorn would wait for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        """Gives the headers of a request their time, from the first byte on; those of a body are counted elsewhere."""
        waits = self._waits() and not self.transport.is_closing()
        if waits and self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self._late)
        elif not waits:
            self._unwatch()

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._waits():
            self.transport.close()

    def _waits(self) -> bool:
        """Whether nobody else counts: before a request, and for what comes of a body after it was refused."""
        theirs, ours = self.conn.their_state, self.conn.our_state
        return theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours is h11.DONE)


def _bound(host: str, port: int) -> socket.socket:
    family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, proto)
    try:
        if os.name == "posix":  # else it would let two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(128)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _free(host: str, port: int) -> int | None:
    """Returns the first port above one that is free."""
    for candidate in range(port + 1, min(port + TRIED_PORTS, 65_536)):
        try:
            _bound(host, candidate).close()
        except OSError:
            continue
        return candidate
    return None
