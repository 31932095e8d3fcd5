"""The socket and its token: what is told before anything is loaded."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest
from rigs.serving import running
from starlette.responses import Response

from interp.view.serving.server import TOKEN, address, checked_token, is_loopback, listening
from sae.base.errors import ConfigError

GOOD = "0123456789abcdef"


def test_a_port_in_use_is_one_line_that_names_a_free_one():
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            listening("127.0.0.1", port)
        found = re.fullmatch(rf"port: {port} is in use on 127.0.0.1; --port (\d+) is free", str(caught.value))
        assert found
        listening("127.0.0.1", int(found[1])).close()
    listening("127.0.0.1", port).close()  # at once again


def test_what_is_no_address_of_this_machine_is_one_line():
    for host in ("203.0.113.7", "no such host"):
        with pytest.raises(ConfigError, match="host: "):
            is_loopback(host) or listening(host, 0)


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.1", True), ("localhost", True), ("127.8.8.8", True), ("0.0.0.0", False), ("::", False)]
)
def test_loopback_is_told_from_what_others_reach(host, own):
    assert is_loopback(host) is own


def test_another_address_needs_a_token_that_is_worth_the_name(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    assert checked_token("127.0.0.1") == ""
    with pytest.raises(ConfigError, match=f"host: 0.0.0.0 can be reached by others; set {TOKEN}"):
        checked_token("0.0.0.0")
    for weak in ("short", "with spaces in it, long", "unié" * 8):
        monkeypatch.setenv(TOKEN, weak)
        with pytest.raises(ConfigError, match=TOKEN) as caught:
            checked_token("127.0.0.1")
        assert weak not in str(caught.value)
    monkeypatch.setenv(TOKEN, GOOD)
    assert checked_token("0.0.0.0") == checked_token("127.0.0.1") == GOOD


def test_the_address_is_one_that_a_browser_opens():
    with listening("127.0.0.1", 0) as sock:
        assert address("127.0.0.1", sock) == f"http://127.0.0.1:{sock.getsockname()[1]}/"
        assert address("::1", sock).startswith("http://[::1]:")


SERVER = """
import sys, time
from interp.view.serving.limits import Limits
from interp.view.serving.server import listening, serve
from interp.view.serving.turns import Turns
from interp.view.serving.guards import Answers
from starlette.responses import Response, StreamingResponse

turns, sock = Turns(Limits()), listening("127.0.0.1", 0)

def endless():
    while True:
        time.sleep(0.01)
        yield "x"

async def app(scope, receive, send):
    await StreamingResponse(turns.pieces(endless()))(scope, receive, send)

serve(Answers(app, lambda *_: Response()), sock, turns, Limits(), lambda: print(sock.getsockname()[1], flush=True))
print("ended")
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_a_server_in_the_middle_of_an_answer():
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        port = int(server.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert b"200 OK" in connection.recv(4096)
            began = time.monotonic()
            server.send_signal(2)
            out, err = server.communicate(timeout=20)
    assert (server.returncode, out) == (0, "ended\n")
    assert "Traceback" not in err
    assert time.monotonic() - began < 5


async def hello(scope, receive, send):
    await Response("hello")(scope, receive, send)


def test_a_machine_without_room_for_connections_is_told_once_and_goes_on(monkeypatch, caplog):
    monkeypatch.setattr("asyncio.constants.ACCEPT_RETRY_DELAY", 0.05)

    def full(_):
        raise OSError(24, "Too many open files", "/home/somebody")

    with running(lambda turns: hello) as ask:
        with monkeypatch.context() as patched:
            patched.setattr("socket.socket.accept", full)
            with socket.create_connection(("127.0.0.1", ask.port)):
                time.sleep(0.3)
        assert ask.get("/").body == b"hello"
    assert [record.getMessage() for record in caplog.records] == [
        "socket.accept() out of system resource (Too many open files)"
    ]
    assert caplog.records[0].exc_info is None
