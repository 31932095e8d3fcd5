"""A server of the live page with canned answers and faults, for what a real one does only when things go wrong."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.routing import Route

from interp.view.reporting.live import LivePage

ABOUT = {
    "model": "quickstart", "coder": "coder", "run": "explain", "d_sae": 48, "site": "model.layers.1", "chat": False,
    "can": dict.fromkeys(("prompt", "test", "search", "meaning", "steer", "notes"), True), "why": {},
    "encoder": "tfidf", "latents": 12, "limits": {"label": 500},
}  # fmt: skip


class Server:
    """What a server of the page answers; `faults` by path: (status, body), or a number of lines after which it ends."""

    def __init__(self, run: Any) -> None:
        self.page, self.run = LivePage(run), run
        self.about: dict[str, Any] = dict(ABOUT)
        self.faults: dict[str, Any] = {}
        self.notes: dict[int, dict[str, Any]] = {}
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, Any]] = []
        self.wait_s = 0.0

    def app(self) -> Starlette:
        """Returns it as an application."""
        posts = [Route(f"/api/{name}", self.post, methods=["POST"]) for name in ("prompt", "test", "search", "steer")]
        return Starlette(
            routes=[
                Route("/", lambda request: HTMLResponse("".join(self.page.html()))),
                Route("/block/{name:path}", lambda request: JSONResponse(self.page.block(request.path_params["name"]))),
                Route("/api/about", lambda request: JSONResponse(self.about)),
                Route("/api/notes", self.noted, methods=["GET", "POST"]),
                *posts,
            ]
        )

    async def noted(self, request: Any) -> Any:
        """Answers as the server's notes do."""
        if request.method == "POST":
            change = await request.json()
            self.asked.append(("notes", change))
            if "notes" in self.faults:
                return JSONResponse(*self.faults["notes"][::-1])
            before = self.notes.get(change["latent"], {"latent": change["latent"], "bookmark": False, "label": None})
            if "was" in change and before["label"] != change["was"]:
                return JSONResponse({"error": "label: changed", "notes": list(self.notes.values())}, 409)
            kept = {name: change[name] for name in ("bookmark", "label") if name in change}
            self.notes[change["latent"]] = {**before, **kept, "changed": "2026-01-01T00:00:00+00:00"}
        return JSONResponse({"notes": list(self.notes.values())})

    async def post(self, request: Any) -> Any:
        """Answers with what was put into `answers`, or as `faults` say."""
        name, body = request.url.path.rpartition("/")[2], await request.json()
        self.asked.append((name, body))
        await asyncio.sleep(self.wait_s)
        fault = self.faults.get(name)
        if isinstance(fault, tuple):
            status, said, *headers = fault
            return JSONResponse(said, status, *headers)
        if name != "steer":
            return JSONResponse(self.answers[name])
        return StreamingResponse(self.lines(self.answers[name], fault), media_type="application/x-ndjson")

    async def lines(self, some: list[Any], most: int | None) -> Any:
        for number, line in enumerate(some):
            if number == most:
                raise RuntimeError("the connection is cut")
            yield json.dumps(line) + "\n"
            await asyncio.sleep(self.wait_s or 0.02)


@contextmanager
def serving(server: Server, port: int = 0) -> Iterator[str]:
    """Yields the address of a server in a thread."""
    config = uvicorn.Config(server.app(), port=port, log_level="critical", timeout_graceful_shutdown=1)
    process = uvicorn.Server(config)
    thread = threading.Thread(target=process.run, daemon=True)
    thread.start()
    while not process.started:
        threading.Event().wait(0.01)
    try:
        yield f"http://127.0.0.1:{process.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        process.should_exit = True
        thread.join()
