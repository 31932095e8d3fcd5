"""sae-view RUN --serve: the page of an explained run that asks its model, and OpenAI's protocol, on this machine."""

import argparse
from importlib.util import find_spec

from sae.base.errors import ConfigError

from .running import DONE, log

NEEDED = ("starlette", "uvicorn")


def serve(options: argparse.Namespace) -> int:
    """Serves until Ctrl-C; the address is the only thing on standard output, printed once all is loaded."""
    if not all(map(find_spec, NEEDED)):
        raise ConfigError(f"--serve: it needs {' and '.join(NEEDED)}: pip install 'sae-interp[view]'")
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port: {options.port} is not from 0 (any that is free) to 65535")

    from interp.view.notes import Notes
    from interp.view.opening import open_run
    from interp.view.reporting.live import LivePage
    from interp.view.serving.app import app
    from interp.view.serving.guards import Access
    from interp.view.serving.limits import Limits
    from interp.view.serving.served import Served
    from interp.view.serving.server import address, checked_token, listening
    from interp.view.serving.server import serve as serve_app
    from interp.view.serving.turns import Turns

    path, limits, token = options.runs[0], Limits(), checked_token(options.host)
    with listening(options.host, options.port) as sock:
        opened = open_run(path, options.model, options.device, options.trust_remote_code)
        if opened.run is None:
            raise ConfigError(f"RUN: nothing is explained in {path}; run this first: sae-explain {path}")
        Notes(opened.run.run_dir)  # a file of a newer version is told of before the model is loaded
        served, page = Served(opened.run, opened.coder, opened.lm, limits), LivePage(opened.run)
        served.warm()
        page.block("main")
        turns = Turns(limits)
        made = app(served, page, Access(options.host, limits, token), turns)

        def ready() -> None:
            print(address(options.host, sock), flush=True)
            log.info("OpenAI's protocol is spoken at v1/, by the name %s; Ctrl-C ends it", served.name)

        serve_app(made, sock, turns, limits, ready)
    return DONE
