"""sae-view RUN --serve: the page of an explained run that asks its model, and OpenAI's protocol, on this machine;
sae-steer RUN --serve: that protocol alone, of any coder that steers.
"""

import argparse
from importlib.util import find_spec

from sae.base.errors import ConfigError

from .running import DONE, log

NEEDED = ("starlette", "uvicorn")


def add_serving(parser: argparse.ArgumentParser) -> None:
    """Adds what says where is served."""
    server = parser.add_argument_group("of --serve")
    server.add_argument("--port", type=int, default=8765, help="0: any that is free (default: 8765)")
    server.add_argument("--host", default="127.0.0.1", help="an address that others reach needs $SAE_VIEW_TOKEN")


def serve(options: argparse.Namespace, path: str, with_page: bool) -> int:
    """Serves until Ctrl-C; the address is the only thing on standard output, printed once all is loaded."""
    if not all(map(find_spec, NEEDED)):
        raise ConfigError(f"--serve: it needs {' and '.join(NEEDED)}: pip install 'sae-interp[view]'")
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port: {options.port} is not from 0 (any that is free) to 65535")

    from interp.view.opening import open_run
    from interp.view.reporting.live import LivePage
    from interp.view.serving.app import app
    from interp.view.serving.guards import Access
    from interp.view.serving.limits import Limits
    from interp.view.serving.served import Served
    from interp.view.serving.server import address, checked_token, listening
    from interp.view.serving.server import serve as serve_app
    from interp.view.serving.turns import Turns
    from sae.steering.hooks import check_steers

    limits, token, page = Limits(), checked_token(options.host), None
    with listening(options.host, options.port) as sock:
        opened = open_run(path, options.model, options.device, options.trust_remote_code)
        if not with_page:
            check_steers(opened.coder.spec)
        elif opened.run is None:
            raise ConfigError(f"RUN: nothing is explained in {path}; run this first: sae-explain {path}")
        else:  # files of a newer version are told of before the model is loaded
            page = LivePage(opened.run)
            page.block("main")
        served = Served(opened.run, opened.coder, opened.lm, limits)
        if served.unsteerable and not with_page:
            raise ConfigError(served.unsteerable)
        served.warm()
        turns = Turns(limits)
        made = app(served, page, Access(options.host, limits, token), turns)

        def ready() -> None:
            print(address(options.host, sock) + "v1/" * (not with_page), flush=True)
            latent = min(508, served.d_sae - 1)
            edited = "" if served.unsteerable else f"; {served.name}+{latent}=4 clamps latent {latent} to 4"
            log.info("OpenAI's protocol is spoken at v1/, by the name %s%s; Ctrl-C ends it", served.name, edited)

        serve_app(made, sock, turns, limits, ready)
    return DONE
