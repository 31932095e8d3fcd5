"""Which address does what.

GET  /  block/NAME                                  the page, and what it looks at
GET  api/about  api/notes                           about the run; what is noted
POST api/prompt  api/test  api/search  api/steer  api/notes
GET  v1/models  v1/models/NAME                      OpenAI's protocol
POST v1/completions  v1/chat/completions
POST login                                          a browser's token, from the form at /

Without a page there is OpenAI's protocol alone.
"""

import html
import re
from collections.abc import Iterable
from typing import Any, Protocol
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route, Router

from interp.view.serving.completions import Completions, as_error
from interp.view.serving.guards import LOGIN, Access, Answers, App, Bodies, Message, Receive, Send, as_json, client_of
from interp.view.serving.panels import Panels
from interp.view.serving.refusing import Refused, of_status
from interp.view.serving.served import Served
from interp.view.serving.turns import Steps, Turns

POLICY = re.compile(r'http-equiv="Content-Security-Policy" content="([^"]*)"')
FORM = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>sae-view</title>
<meta name="viewport" content="width=device-width, initial-scale=1"></head>
<body><main><h1>sae-view</h1>{said}<form method="post" action="login">
<p><label for="token">The token in SAE_VIEW_TOKEN of this server</label></p>
<p><input id="token" name="token" type="password" autocomplete="current-password" required autofocus></p>
<p><button>Open</button></p></form></main></body></html>
"""
FORM_POLICY = "default-src 'none'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
LONGEST_NAME = 200


class Page(Protocol):
    """A page, and the blocks that it asks for."""

    def html(self) -> Iterable[str]:
        """Returns the page, in parts."""
        ...

    def block(self, name: str) -> Any:
        """Returns the value of a block; KeyError if there is none."""
        ...


def app(served: Served, page: Page | None, access: Access, turns: Turns) -> App:
    """Returns the whole server as an application of ASGI."""
    completions = Completions(served, turns)
    routes: dict[tuple[str, str], Any] = {
        ("GET", "/v1/models"): completions.models,
        ("GET", "/v1/models/{name:path}"): completions.models,
        ("POST", "/v1/completions"): completions.completions,
        ("POST", "/v1/chat/completions"): completions.chat,
    }
    if page and served.run:
        panels = Panels(served, served.run, turns)
        routes |= _of_page(page, access, turns) | {
            ("GET", "/api/about"): panels.about,
            ("POST", "/api/prompt"): panels.prompt,
            ("POST", "/api/test"): panels.test,
            ("POST", "/api/search"): panels.search,
            ("POST", "/api/steer"): panels.steer,
            ("GET", "/api/notes"): panels.notes,
            ("POST", "/api/notes"): panels.note,
        }
    router = Router(
        [Route(path, do, methods=[method]) for (method, path), do in routes.items()], redirect_slashes=False
    )

    async def routed(scope: Message, receive: Receive, send: Send) -> None:
        scope["app"] = router  # so that what is not found is an exception, as all that goes wrong
        try:
            await router(scope, receive, send)
        except HTTPException as error:
            raise Refused(error.status_code, of_status(error.status_code)) from error

    return Answers(Bodies(routed, access), _said if page else _said_of_protocol, served.places)


def _of_page(page: Page, access: Access, turns: Turns) -> dict[tuple[str, str], Any]:
    """Returns what answers where the page and its blocks are asked for."""
    text = "".join(page.html())
    found = POLICY.search(text)
    policy = html.unescape(found[1]) if found else "default-src 'none'"
    headers = {"content-security-policy": f"{policy}; frame-ancestors 'none'"}

    async def index(_: Request) -> Response:
        return HTMLResponse(text, headers=headers)

    async def block(request: Request) -> Response:
        name = request.path_params["name"]

        def steps() -> Steps:
            try:
                yield JSONResponse(page.block(name))
            except KeyError:
                raise Refused(404, "block: there is none of this name") from None

        if len(name) > LONGEST_NAME:
            raise Refused(404, "block: there is none of this name")
        return await turns.one(steps(), (client_of(request.scope), "page"))

    async def login(request: Request) -> Response:
        try:
            typed = parse_qs((await request.body()).decode(), max_num_fields=4).get("token", [""])[0]
        except ValueError:
            typed = ""
        cookie = access.login(request.scope, typed)
        return RedirectResponse("/", 303, {"set-cookie": cookie})

    return {("GET", "/"): index, ("GET", "/block/{name:path}"): block, ("POST", LOGIN): login}


def _said(scope: Message, refused: Refused) -> App:
    """Returns how an error is told: to a program of the protocol, to a browser that may log in, and to the page."""
    if scope["path"].startswith("/v1/"):
        return _said_of_protocol(scope, refused)
    if refused.status == 401 and scope["path"] in ("/", LOGIN):
        said = f"<p role='alert'>{html.escape(str(refused))}</p>" if scope["path"] == LOGIN else ""
        return HTMLResponse(FORM.format(said=said), 401, {"content-security-policy": FORM_POLICY})
    status, headers, body = as_json(refused, str(refused))
    return Response(body, status, headers)


def _said_of_protocol(_: Message, refused: Refused) -> App:
    status, headers, body = as_json(refused, as_error(refused))
    return Response(body, status, headers)
