"""An OpenAI-compatible server on loopback, in this process, that answers by a script and fails on command.

    with FakeLLM(lambda asked: "yes") as server:            # or an Answer, or a Fault
        config = EndpointConfig(model="fake", base_urls=(server.url,))
        ...
        server.faults.extend([rate_limited(1), None, hang()])   # the next calls, in order; None: answered normally
        server.always = broken(500)                             # every call from now on, once `faults` is used up
        assert len(server.calls) == 3                           # what came in, probes included

The callable gets an `Asked` and returns a text or an `Answer`. What the server can do is set by keywords: `logprobs`
(how many alternatives, 0 for none), `schemas` (the rungs of structured output that it enforces; others are ignored in
silence), `limits`, `temperature`, `system`, `thinks`, `echo` (what /completions says to a prompt). A schema that is
enforced replaces an answer that does not follow it. `denies` says what becomes of a call of any kind instead of an
answer. `twists` change the next JSON that goes out, in order. `batch_script` decides what becomes of each batch (see
`Batch`).
"""

import contextlib
import json
import math
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from interp.client import schema as schemas_of_answers
from interp.client.config import EndpointConfig

KEY = "sk-test-0123456789abcdef"


@dataclass(frozen=True)
class Asked:
    """A call that came in."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    """Their names in lower case."""
    at: float
    query: str = ""

    @property
    def messages(self) -> list[tuple[str, str]]:
        return [(m["role"], m["content"]) for m in self.body.get("messages", ())]

    @property
    def text(self) -> str:
        """The last message, or the prompt."""
        return self.messages[-1][1] if self.messages else str(self.body.get("prompt", self.body.get("input", "")))


@dataclass(frozen=True)
class Answer:
    """What the model says."""

    text: str | None = "hello"
    first: dict[str, float] = field(default_factory=dict)
    """Probabilities of the first token; the text's own by default."""
    finish: str = "stop"
    message: dict[str, Any] = field(default_factory=dict)
    """More fields of the message: refusal, reasoning_content."""
    usage: tuple[int, int] | None = (10, 2)
    delay_s: float = 0.0


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a call instead of an answer."""

    status: int = 200
    body: str | bytes | dict[str, Any] = ""
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    cut: int | None = None
    """Bytes of the body after which the connection is dropped."""
    drip_s: float = 0.0
    """Pause after every byte."""
    hangs: bool = False
    """Whether no answer ever comes."""
    after: bool = False
    """Whether a batch is made all the same, and only the answer is lost."""


def error(status: int, message: str, code: str = "", **headers: str) -> Fault:
    """An error as OpenAI words it."""
    body = {"error": {"message": message, "type": code or "error", "code": code or None, "param": None}}
    return Fault(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def rate_limited(retry_after: float | str | None = None) -> Fault:
    return error(429, "slow down", **({} if retry_after is None else {"Retry_After": str(retry_after)}))


def no_quota() -> Fault:
    return error(429, f"You exceeded your current quota, key {KEY}", "insufficient_quota")


def broken(status: int = 500) -> Fault:
    return error(status, "internal error")


def hang() -> Fault:
    return Fault(hangs=True)


def drip() -> Fault:
    return Fault(body={"choices": [{"message": {"content": "x" * 10_000}}]}, drip_s=0.01)


def dropped() -> Fault:
    return Fault(body={"choices": [{"message": {"content": "x" * 1000}, "finish_reason": "stop"}]}, cut=40)


def web_page() -> Fault:
    return Fault(body=f"<html><body>Bad gateway {KEY}</body></html>", content_type="text/html")


def truncated() -> Fault:
    return Fault(body='{"choices": [{"message": {"content": "hel')


def no_choices() -> Fault:
    return Fault(body={"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}})


def says(answer: Answer) -> Fault:
    """An answer out of the ordinary, as a fault: a refusal, null content, a cut."""
    return Fault(body=completion(answer, {}))


@dataclass
class Batch:
    """A batch on the server. A script is called with it when its state is asked for, and may change it.

    `finish()` answers its requests; `keep` picks the custom_ids that are answered, `fail` those that end in the error
    file with a status.
    """

    id: str
    input_file_id: str
    endpoint: str
    metadata: dict[str, str]
    server: "FakeLLM"
    status: str = "in_progress"
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[dict[str, str]] = field(default_factory=list)
    created_at: int = field(default_factory=lambda: int(time.time()))

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.server.files[self.input_file_id].splitlines()]

    def finish(
        self,
        status: str = "completed",
        keep: Callable[[str], bool] = lambda _: True,
        fail: Callable[[str], int] = lambda _: 0,
        junk: bytes = b"",
    ) -> None:
        """Ends the batch: answers in reverse order, errors apart; what is neither kept nor failed is in no file."""
        good, bad = [], []
        for entry in reversed(self.requests()):
            name = entry["custom_id"]
            code = fail(name)
            if code < 0:
                bad.append({"id": "x", "custom_id": name, "response": None, "error": {"code": "batch_expired"}})
            elif code:
                response = {"status_code": code, "body": {"error": {"message": f"no {KEY}"}}}
                bad.append({"id": "x", "custom_id": name, "response": response, "error": None})
            elif keep(name):
                path = entry["url"].removeprefix("/v1")
                asked = Asked(path, entry["body"], {}, time.monotonic())
                response = {"status_code": 200, "request_id": "r", "body": self.server.answered(asked)}
                good.append({"id": "x", "custom_id": name, "response": response, "error": None})
        self.status = status
        self.output_file_id = self.server.store(junk + _lines(good)) if good else None
        self.error_file_id = self.server.store(_lines(bad)) if bad else None

    def to_json(self) -> dict[str, Any]:
        shown = {name: value for name, value in vars(self).items() if name not in ("server", "errors")}
        shown |= {"object": "batch", "completion_window": "24h", "errors": {"object": "list", "data": self.errors}}
        return shown | {"request_counts": {"total": len(self.requests()), "completed": 0, "failed": 0}}


class FakeLLM:
    """The server; a context manager."""

    def __init__(
        self,
        answer: Callable[[Asked], "str | Answer | Fault"] = lambda _: "hello",
        *,
        logprobs: int = 20,
        schemas: tuple[str, ...] = ("json_schema",),
        limits: tuple[str, ...] = ("max_tokens", "max_completion_tokens"),
        temperature: bool = True,
        system: bool = True,
        thinks: str = "",
        quiet: str = "",
        echo: Callable[[str, int], dict[str, Any]] | None = None,
        denies: Callable[[Asked], Fault | None] = lambda _: None,
        batch_script: Callable[[Batch], None] = lambda batch: batch.finish(),
        port: int = 0,
    ) -> None:
        self.answer, self.batch_script, self.port = answer, batch_script, port
        self.logprobs, self.schemas, self.limits = logprobs, schemas, limits
        self.temperature, self.system, self.thinks, self.quiet = temperature, system, thinks, quiet
        self.echo, self.denies = echo or echoed, denies
        self.twists: deque[Callable[[Any], Any]] = deque()
        self.calls: list[Asked] = []
        self.faults: deque[Fault | None] = deque()
        self.always: Fault | None = None
        self.files: dict[str, bytes] = {}
        self.batches: list[Batch] = []
        self.busy = self.most_busy = 0
        self._lock = threading.Lock()
        self._over = threading.Event()

    def __enter__(self) -> "FakeLLM":
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = _Server(("127.0.0.1", self.port), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in self._server.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def asked(self, text: str) -> list[Asked]:
        """The calls whose last message or prompt holds a text."""
        return [call for call in self.calls if text in call.text]

    def store(self, content: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return name

    def answered(self, asked: Asked, said: "str | Answer | None" = None) -> dict[str, Any]:
        """The JSON of a normal answer."""
        body = asked.body
        if asked.path == "/embeddings":
            texts = body["input"]
            data = [{"index": i, "embedding": vector(text), "object": "embedding"} for i, text in enumerate(texts)]
            return {"data": data, "usage": {"prompt_tokens": 3 * len(texts), "total_tokens": 3 * len(texts)}}
        if asked.path == "/completions":
            return self.echo(body["prompt"], body.get("logprobs") or 0)
        found = self.answer(asked) if said is None else said
        answer = found if isinstance(found, Answer) else Answer(str(found))
        if self.thinks and not (self.quiet and self.quiet in json.dumps(body)):
            thought = f"<think>well, {answer.text}? hm</think>" if self.thinks == "inline" else ""
            answer = Answer(thought + str(answer.text), answer.first, answer.finish, answer.message, answer.usage)
            if self.thinks == "field":
                answer.message["reasoning_content"] = "well, hm"
        answer = self._limited(self._bound(answer, body), body)
        return completion(answer, {**body, "top_logprobs": min(self.logprobs, body.get("top_logprobs") or 0)})

    def _bound(self, answer: Answer, body: dict[str, Any]) -> Answer:
        """The answer under the response format, where that is enforced."""
        wanted = body.get("response_format") or {}
        rung = wanted.get("type", "") + (
            "_schema" if wanted.get("type") == "json_object" and "schema" in wanted else ""
        )
        rule = wanted.get("schema") or (wanted.get("json_schema") or {}).get("schema") or {"type": "object"}
        if not wanted or rung not in self.schemas or answer.message.get("refusal"):
            return answer
        if not schemas_of_answers.parse(str(answer.text), rule)[1]:
            return answer
        return Answer(json.dumps(instance(rule)), usage=answer.usage)

    def _limited(self, answer: Answer, body: dict[str, Any]) -> Answer:
        """The answer cut to the limit that the server knows, a word a token."""
        limit = next((body[name] for name in self.limits if name in body), None)
        words = str(answer.text).split(" ")
        if limit is None or len(words) <= limit or limit == 1:
            return answer
        return Answer(" ".join(words[:limit]), answer.first, "length", answer.message, answer.usage, answer.delay_s)

    def refuses(self, asked: Asked) -> Fault | None:
        """The error for a field that the server does not take."""
        body, denied = asked.body, self.denies(asked)
        if denied or asked.path != "/chat/completions":
            return denied
        known = [name for name in ("max_tokens", "max_completion_tokens") if name in body and name not in self.limits]
        if known and len(self.limits) == 1:
            return error(400, f"Unsupported parameter: {known[0]}", "unsupported_parameter")
        if not self.temperature and "temperature" in body:
            return error(400, "Unsupported value: temperature", "unsupported_value")
        if not self.system and any(role == "system" for role, _ in asked.messages):
            return error(400, "System role not supported")
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    fake: FakeLLM
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        path = parts.path.removeprefix("/v1")
        if path == "/files":
            return self._json({"id": self.fake.store(_uploaded(raw)), "object": "file", "purpose": "batch"})
        body = json.loads(raw)
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(path, body, headers, time.monotonic(), parts.query)
        with self.fake._lock:
            self.fake.calls.append(asked)
            fault = self.fake.faults.popleft() if self.fake.faults else self.fake.always
            self.fake.busy += 1
            self.fake.most_busy = max(self.fake.most_busy, self.fake.busy)
        try:
            self._answer(asked, fault)
        finally:
            with self.fake._lock:
                self.fake.busy -= 1

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        names = parts.path.removeprefix("/v1/").split("/")
        if names[0] == "files":
            return self._send(200, self.fake.files[names[1]], "application/octet-stream")
        if len(names) == 2:
            batch = next(batch for batch in self.fake.batches if batch.id == names[1])
            self.fake.batch_script(batch)
            return self._json(batch.to_json())
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        newest = list(reversed(self.fake.batches))
        start = next((i + 1 for i, batch in enumerate(newest) if batch.id == query.get("after")), 0)
        stop = start + int(query.get("limit", 20))
        page = [batch.to_json() for batch in newest[start:stop]]
        return self._json({"object": "list", "data": page, "has_more": stop < len(newest)})

    def _answer(self, asked: Asked, fault: Fault | None) -> None:
        if asked.path == "/batches" and (fault is None or fault.after):
            body = asked.body
            name = f"batch-{len(self.fake.batches)}"
            batch = Batch(name, body["input_file_id"], body["endpoint"], body.get("metadata") or {}, self.fake)
            self.fake.batches.append(batch)
            if fault is None:
                return self._json(batch.to_json())
        said = None
        chat = asked.path == "/chat/completions"
        fault = fault or self.fake.refuses(asked)
        if fault is None and chat:
            said = self.fake.answer(asked)
            if isinstance(said, Answer) and said.delay_s:
                self.fake._over.wait(said.delay_s)
        if isinstance(said, Fault):
            fault = said
        if fault is None:
            assert not isinstance(said, Fault)
            return self._json(self.fake.answered(asked, said))
        if fault.hangs:
            self.fake._over.wait(60)
            self.close_connection = True
            return None
        text = json.dumps(fault.body) if isinstance(fault.body, dict) else fault.body
        raw = b"" if fault.status in (204, 304) else text.encode() if isinstance(text, str) else text
        return self._send(fault.status, raw, fault.content_type, fault)

    def _json(self, value: Any) -> None:
        with self.fake._lock:
            twist = self.fake.twists.popleft() if self.fake.twists else lambda plain: plain
        self._send(200, json.dumps(twist(value)).encode(), "application/json")

    def _send(self, status: int, raw: bytes, kind: str, fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in (fault.headers if fault else {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if fault and fault.drip_s:
            for byte in raw:
                self.wfile.write(bytes([byte]))
                if self.fake._over.wait(fault.drip_s):
                    break
        elif fault and fault.cut is not None:
            self.wfile.write(raw[: fault.cut])
        else:
            self.wfile.write(raw)
        if fault and (fault.cut is not None or fault.drip_s):
            self.close_connection = True


def completion(answer: Answer, body: dict[str, Any]) -> dict[str, Any]:
    """A chat completion."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text, **answer.message},
        "finish_reason": answer.finish,
    }
    top = body.get("top_logprobs") or 0
    if body.get("logprobs") and top and answer.text:
        first = answer.first or {answer.text.split()[0]: 1.0}
        listed = sorted(first.items(), key=lambda pair: -pair[1])[:top]
        alternatives = [{"token": token, "logprob": math.log(max(p, 1e-9)), "bytes": None} for token, p in listed]
        choice["logprobs"] = {"content": [{**alternatives[0], "top_logprobs": alternatives}]}
    whole: dict[str, Any] = {"id": "c", "object": "chat.completion", "model": "fake", "choices": [choice]}
    if answer.usage is not None:
        whole["usage"] = {"prompt_tokens": answer.usage[0], "completion_tokens": answer.usage[1]}
    return whole


def echoed(text: str, top: int) -> dict[str, Any]:
    """A prompt with log-probabilities: a token is a word with the blank before it, its log-probability -0.01 a letter.

    Levels 0 to 9 are offered at every token, level d with a tenth of d + 1.
    """
    found = [(match.start(), match.group()) for match in re.finditer(r"\s*\S+|\s+", text)]
    tokens = [token for _, token in found]
    offered = {f" {level}": math.log((level + 1) / 100) for level in range(min(10, top))}
    return {
        "choices": [
            {
                "text": text + " end",
                "finish_reason": "length",
                "logprobs": {
                    "tokens": [*tokens, " end"],
                    "text_offset": [*(start for start, _ in found), len(text)],
                    "token_logprobs": [None, *(-0.01 * len(token) for token in tokens[1:]), -1.0],
                    "top_logprobs": [None, *({**offered, token: -0.01} for token in tokens[1:]), offered],
                },
            }
        ],
        "usage": {"prompt_tokens": len(tokens), "completion_tokens": 1},
    }


def silent(text: str, top: int) -> dict[str, Any]:
    """What a server says to a prompt that ignores `echo`."""
    return {"choices": [{"text": ".", "finish_reason": "length"}]}


def vector(text: str) -> list[float]:
    """A text's made-up embedding."""
    return [float(len(text)), float(text.count("a")), 0.1]


def instance(rule: dict[str, Any]) -> Any:
    """The smallest value that follows a schema."""
    if "enum" in rule:
        return rule["enum"][0]
    kind = rule.get("type")
    if kind == "object":
        return {name: instance(rule["properties"][name]) for name in rule.get("required", ())}
    if kind == "array":
        return [instance(rule.get("items", {})) for _ in range(rule.get("minItems", 0))]
    return {"string": "", "integer": 0, "number": 0.5, "boolean": True}.get(kind or "")


def _uploaded(raw: bytes) -> bytes:
    """The file within a multipart form: the part that has a file name."""
    boundary = raw.split(b"\r\n", 1)[0]
    part = next(part for part in raw.split(boundary) if b"filename=" in part)
    return part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")


def _lines(entries: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def endpoint(server: FakeLLM, **changes: Any) -> EndpointConfig:
    """The server as a role's model, with little patience."""
    defaults: dict[str, Any] = {"model": "fake", "base_urls": (server.url,), "max_concurrency": 8, "timeout_s": 20.0}
    return EndpointConfig(**{**defaults, **changes})


def hurry(client: Any, timeout_s: float | None) -> None:
    """Shortens what a client's servers have for an answer; after the probe, which a busy machine may slow down."""
    for holder in client._holders.values():
        holder.config = replace(holder.config, timeout_s=timeout_s or holder.config.timeout_s)


def impatient(monkeypatch: Any) -> None:
    """Makes pauses a thousandth of what they are."""
    from interp.client.remote import limiter

    monkeypatch.setattr(limiter, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(limiter, "LONGEST_PAUSE_S", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
