"""A server of ours on a free port of this machine, in a thread of the test, and what asks it word for word."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from interp.view.serving.limits import Limits
from interp.view.serving.server import _Server, configured, listening
from interp.view.serving.turns import Turns


@dataclass
class Answered:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Asks:
    """A client of one server, which says just what it is told to."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __call__(
        self, method: str, path: str, data: Any = None, headers: dict[str, str | None] | None = None
    ) -> Answered:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = data if isinstance(data, bytes | None) else json.dumps(data).encode()
        said = {"Host": f"127.0.0.1:{self.port}"} | ({"Content-Type": "application/json"} if body is not None else {})
        said = {name: value for name, value in (said | (headers or {})).items() if value is not None}
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in (said | ({"Content-Length": str(len(body))} if body is not None else {})).items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            told = {name.lower(): value for name, value in answer.getheaders()}
            return Answered(answer.status, told, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answered:
        return self("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def post(self, path: str, data: Any, **headers: str) -> Answered:
        return self("POST", path, data, {name.replace("_", "-"): value for name, value in headers.items()})


@contextmanager
def running(make: Any, limits: Limits | None = None) -> Iterator[Asks]:
    """Yields a client of a server of the application that `make(turns)` returns."""
    limits = limits or Limits()
    turns, sock, ready = Turns(limits), listening("127.0.0.1", 0), threading.Event()
    server = _Server(configured(make(turns), limits), turns, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    port = sock.getsockname()[1]
    thread.start()
    assert ready.wait(30)
    try:
        yield Asks(port)
    finally:
        server.should_exit = server.force_exit = True
        turns.end()
        thread.join(20)
        assert not thread.is_alive()
