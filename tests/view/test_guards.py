"""Guards: who may ask, how often and how much, and that no answer leaks what is not asked for."""

import asyncio
import socket
import threading
import time

import pytest
from rigs.serving import running
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from interp.view.serving import guards
from interp.view.serving.guards import Access, Answers, Bodies, as_json, host_name
from interp.view.serving.limits import Limits
from interp.view.serving.refusing import Refused, told
from sae.base.errors import ConfigError, DataError

TOKEN = "correct-horse-battery-staple"
SECRET = "/home/somebody/secret"


def guarded(limits=None, token="", host="127.0.0.1"):
    """An application behind the guards, which echoes, fails, waits or streams by its address."""
    access = Access(host, limits or Limits(), token)

    async def inner(scope, receive, send):
        request = Request(scope, receive)
        body = await request.body()
        path = scope["path"]
        if path == "/config":
            raise ConfigError(f"text: {SECRET}/run/x is\nwrong \u202e")
        if path == "/data":
            raise DataError(f"{SECRET}/run is damaged")
        if path == "/broken":
            raise KeyError(f"{SECRET} {body!r} {TOKEN}")
        if path == "/memory":
            raise MemoryError
        if path == guards.LOGIN:
            cookie = access.login(scope, body.decode())
            await Response("", headers={"set-cookie": cookie})(scope, receive, send)
            return
        await JSONResponse({"got": body.decode("latin-1")})(scope, receive, send)

    def said(scope, refused):
        status, headers, body = as_json(refused, str(refused))
        return Response(body, status, headers)

    return Answers(Bodies(inner, access), said, (SECRET,))


@pytest.fixture(scope="module")
def ask():
    with running(lambda turns: guarded()) as asks:
        yield asks


@pytest.fixture(scope="module")
def ask_with_token():
    with running(lambda turns: guarded(token=TOKEN)) as asks:
        yield asks


def test_what_is_allowed_is_answered_with_the_headers_of_every_answer(ask):
    for answer in (ask.get("/"), ask.post("/api/x", {"a": 1}), ask("GET", "/", headers={"Host": "localhost:9"})):
        assert answer.status == 200
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "server" not in answer.headers
    assert ask.post("/x", {"a": 1}).json == {"got": '{"a": 1}'}


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "127.0.0.1@evil.example", "[::1", "10.0.0.1"],
)
def test_a_foreign_host_is_refused(ask, host):
    for method, path in (("GET", "/"), ("POST", "/api/x")):
        answer = ask(method, path, {} if method == "POST" else None, {"Host": host})
        assert answer.status in (400, 403)
        assert b"got" not in answer.body


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALHOST:1", "[::1]:80"])
def test_the_names_of_this_machine_are_its_own(ask, host):
    assert ask("GET", "/", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_another_origin_is_refused(ask, headers):
    assert ask("POST", "/api/x", {}, headers).status == 403
    assert ask("GET", "/api/about", headers=headers).status == 403
    assert ask("GET", "/block/main", headers=headers).status == 403
    assert ask("POST", "/", {}, headers).status == 403


def test_the_page_itself_may_be_opened_by_a_link_and_asks_its_server(ask):
    assert ask.get("/", Sec_Fetch_Site="cross-site").status == 200
    assert ask.post("/api/x", {}, Origin=ask.url, Sec_Fetch_Site="same-origin").status == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None, "application/jsonp"]
)
def test_a_form_of_another_page_is_no_json(ask, kind):
    assert ask("POST", "/api/x", b"{}", {"Content-Type": kind}).status == 415


def test_what_goes_wrong_is_one_line_without_places(ask, caplog):
    answer = ask.post("/config", {})
    assert (answer.status, answer.json) == (400, {"error": "text: secret/run/x is wrong \\u{202e}"})
    assert (ask.post("/data", {}).status, ask.post("/data", {}).json) == (500, {"error": "secret/run is damaged"})
    assert ask.post("/memory", {}).status == 503
    caplog.clear()
    answer = ask.post("/broken", {"text": "what a user typed"})
    assert answer.status == 500
    line = answer.json["error"]
    assert line.startswith("internal error ")
    number = line.split()[2].strip(";")
    assert number in caplog.text
    assert "KeyError" in caplog.text
    assert "test_guards.py" in caplog.text  # where
    for secret in (SECRET, TOKEN, "what a user typed", "Traceback"):
        assert secret not in caplog.text + answer.body.decode()


def raw(port, *parts, wait=0.0):
    """Sends bytes as they are, and returns all that comes back until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:
                break
            time.sleep(wait)
        found = b""
        try:
            while more := connection.recv(65536):
                found += more
        except OSError:
            pass
        return found


HEAD = b"POST /api/x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"


def test_a_huge_body_is_refused_however_it_comes():
    with running(lambda turns: guarded(Limits(body=1000))) as ask:
        assert ask.post("/x", b"x" * 1000).status == 200
        assert ask.post("/x", b"x" * 1001).status == 413
        told = raw(ask.port, HEAD + b"Content-Length: 99999999999\r\n\r\n", b"x" * 10)
        assert told.startswith(b"HTTP/1.1 413")
        chunk = b"190\r\n" + b"x" * 400 + b"\r\n"
        told = raw(ask.port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk, chunk, b"0\r\n\r\n")
        assert told.startswith(b"HTTP/1.1 413")
        told = raw(ask.port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk, b"0\r\n\r\n")
        assert told.startswith(b"HTTP/1.1 200")
        told = raw(ask.port, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n")
        assert told.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "lines",
    [
        b"Host: evil.example\r\n",
        b"Content-Type: text/plain\r\n",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: -1\r\n",
        b"Origin: http://127.0.0.1\r\nOrigin: http://evil.example\r\n",
    ],
)
def test_a_header_that_comes_twice_or_contradicts_another_is_refused(ask, lines):
    assert raw(ask.port, HEAD + lines + b"\r\n{}").startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))


def test_no_websocket_is_opened(ask):
    upgrade = b"GET /api/x HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n"
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    assert b" 101 " not in raw(ask.port, upgrade + key + b"\r\n").split(b"\r\n")[0]


def test_a_request_that_dribbles_is_ended(monkeypatch):
    monkeypatch.setattr("interp.view.serving.server.HEADER_SECONDS", 0.2)
    with running(lambda turns: guarded(Limits(body_seconds=0.2))) as ask:
        began = time.monotonic()
        assert raw(ask.port, *(bytes([byte]) for byte in HEAD), wait=0.02) == b""
        assert raw(ask.port) == b""  # nothing at all
        told = raw(ask.port, HEAD + b"Content-Length: 5\r\n\r\n", *[b"x"] * 3, wait=0.1)
        assert told.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 8
        assert ask.get("/").status == 200


def test_too_many_requests_are_told_when_to_come_again():
    with running(lambda turns: guarded(Limits(burst=3, a_second=20))) as ask:
        assert [ask.get("/").status for _ in range(3)] == [200] * 3
        answer = next(answer for answer in (ask.get("/") for _ in range(20)) if answer.status != 200)
        assert answer.status == 429
        assert int(answer.headers["retry-after"]) >= 1
        time.sleep(0.2)
        assert ask.get("/").status == 200


def test_the_token_is_needed_and_told_nowhere(ask_with_token, caplog):
    ask, right = ask_with_token, f"Bearer {TOKEN}"
    answers = [ask.get("/"), ask.get("/api/x"), ask.post("/v1/x", {}), ask.get("/", Authorization="Bearer wrong")]
    answers += [ask.get("/", Authorization=f"Basic {TOKEN}"), ask.get("/", Authorization="Bearer ")]
    answers += [ask.get("/", Cookie=f"sae_view_{ask.port}={kept}") for kept in (TOKEN, "")]
    answers += [ask.get(f"/?token={TOKEN}")]
    for answer in answers:
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert TOKEN.encode() not in answer.body
    assert ask.get("/api/x", Authorization=right).status == 200
    assert ask.get("/api/x", Authorization=f"bearer  {TOKEN}").status == 200
    assert TOKEN not in caplog.text


def test_a_browser_logs_in_once_and_keeps_no_token(ask_with_token):
    ask = ask_with_token
    assert ask.post(guards.LOGIN, b"wrong").status == 401
    assert ask.post(guards.LOGIN, TOKEN.encode(), Origin="http://evil.example").status == 403
    answer = ask.post(guards.LOGIN, TOKEN.encode())
    cookie = answer.headers["set-cookie"]
    assert answer.status == 200
    assert TOKEN not in cookie
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    kept = cookie.split(";")[0]
    assert ask.get("/", Cookie=f"a=b; {kept}; c=d").status == 200
    assert ask.get("/", Cookie=kept + "x").status == 401


def test_who_guesses_tokens_is_slowed_down():
    with running(lambda turns: guarded(Limits(burst=60, a_second=1), token=TOKEN)) as ask:
        statuses = [ask.get("/", Authorization=f"Bearer guess {n}").status for n in range(6)]
        assert statuses[0] == 401
        assert statuses[-1] == 429
        assert ask.get("/", Authorization=f"Bearer {TOKEN}").status == 429


def test_a_client_that_goes_away_ends_what_it_asked_for():
    ended, begun = threading.Event(), threading.Event()

    async def endless(scope, receive, send):
        request = Request(scope, receive)
        await request.body()

        async def parts():
            try:
                while True:
                    begun.set()
                    await asyncio.sleep(0.01)
                    if scope["path"] == "/stream":
                        yield "x"
            finally:
                ended.set()

        if scope["path"] == "/stream":
            await StreamingResponse(parts())(scope, receive, send)
        async for _ in parts():
            pass

    app = Answers(Bodies(endless, Access("127.0.0.1", Limits())), lambda *_: Response("", 500))
    with running(lambda turns: app) as ask:
        for path in ("/stream", "/plain"):
            ended.clear(), begun.clear()
            with socket.create_connection(("127.0.0.1", ask.port)) as connection:
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
                assert begun.wait(5)
            assert ended.wait(5)


def test_a_server_of_all_addresses_is_called_by_any_but_no_domain():
    access = Access("0.0.0.0", Limits(), TOKEN)
    for name in ("10.1.2.3", "fe80::1", "localhost", socket.gethostname().lower()):
        assert access.known(name)
    for name in ("evil.example", "", "10.1.2.3.evil.example"):
        assert not access.known(name)
    assert not Access("10.1.2.3", Limits(), TOKEN).known("10.1.2.4")
    assert Access("10.1.2.3", Limits(), TOKEN).known("10.1.2.3")


def test_names_are_read_as_browsers_do():
    found = {host: host_name(host) for host in ("A.b:80", "[::1]:8", "a/b", "a@b", "a:b", "a:99999", "", "a b")}
    assert found["A.b:80"] == "a.b"
    assert found["[::1]:8"] == "::1"
    assert {found[host] for host in ("a/b", "a@b", "a:b", "a:99999", "")} == {""}


def test_a_refusal_says_when_and_what():
    status, headers, body = as_json(Refused(429, "later", wait_s=0.2), {"message": "x"})
    assert (status, headers["retry-after"], body) == (429, "1", b'{"error": {"message": "x"}}')


@pytest.mark.parametrize("origin", ["http://[bad", "file://", "http://127.0.0.1:{port}/x", "http://x@127.0.0.1:{port}"])
def test_an_origin_that_no_browser_says_is_refused(ask, origin):
    answer = ask.post("/api/x", {}, Origin=origin.format(port=ask.port))
    assert (answer.status, answer.json) == (403, {"error": "origin: only the page of this server may ask it"})
    assert ask.post("/api/x", {}, Origin=f"https://127.0.0.1:{ask.port}").status == 200  # a proxy that speaks TLS


def test_what_is_left_of_a_refused_body_is_not_read_for_ever(ask, monkeypatch):
    monkeypatch.setattr("interp.view.serving.server.HEADER_SECONDS", 0.2)
    head = b"POST /api/x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    began = time.monotonic()
    assert raw(ask.port, head, *[b"1\r\nx\r\n"] * 100, wait=0.05).startswith(b"HTTP/1.1 415")
    assert time.monotonic() - began < 3
    first = head.replace(b"text/plain", b"application/json") + b"0\r\n\r\n"
    told = raw(ask.port, first, first.replace(b"chunked", b"chunked\r\nConnection: close"), wait=0.02)
    assert told.count(b"HTTP/1.1 200") == 2  # a connection whose bodies end stays open


def test_two_servers_of_a_machine_do_not_log_each_other_out(ask_with_token):
    with running(lambda turns: guarded(token=TOKEN)) as other:
        kept = [
            one.post(guards.LOGIN, TOKEN.encode()).headers["set-cookie"].split(";")[0]
            for one in (ask_with_token, other)
        ]
        assert kept[0].split("=")[0] != kept[1].split("=")[0]
        both = "; ".join(kept)
        assert (ask_with_token.get("/", Cookie=both).status, other.get("/", Cookie=both).status) == (200, 200)
        assert other.get("/", Cookie=kept[0]).status == 401


def test_a_name_is_known_however_it_was_typed():
    assert Access("MyHost", Limits(), TOKEN).known(host_name("myhost:80"))


def test_no_path_of_this_machine_is_told_whatever_it_is_of():
    said = told(
        ConfigError("x: /opt/a b/c.json, '~/models/gemma' or C:\\Users\\me\\x; see https://h.co/a/b, 1/2 and a/b")
    )
    assert str(said) == "x: a b/c.json, 'gemma' or x; see https://h.co/a/b, 1/2 and a/b"
