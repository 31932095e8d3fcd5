"""sae-view RUN --prompt: which latents fire on a text, with their labels and effects on the next token."""

import argparse
import shutil
import sys

from sae.base.arguments import whole
from sae.base.errors import ConfigError

from .running import DONE, log
from .telling import report, say_next, wants_colors

STDIN = "-"
NO_TERMINAL = 120  # columns


def tell_prompt(options: argparse.Namespace) -> int:
    """Tells which latents fire on a text."""
    text, top = typed_text(options.prompt, "--prompt"), whole("--top", options.top)

    from interp.run.latents import ids_among
    from interp.view.firing.prompting import prompt
    from interp.view.firing.table import lines
    from interp.view.opening import open_run

    opened = open_run(options.runs[0], options.model, options.device, options.trust_remote_code)
    d_sae = opened.coder.spec.d_sae
    latents = None if options.latents is None else ids_among(range(d_sae), options.latents, d_sae)
    found = prompt(opened.coder, opened.lm, text, opened.run, top, latents=latents, chat=options.chat)
    width = shutil.get_terminal_size((NO_TERMINAL, 0)).columns if sys.stdout.isatty() else NO_TERMINAL
    report(options.json, found.to_json(), lines(found, found.top(by=options.by), width, wants_colors()))
    if opened.run is None:
        log.info("labels       none: nothing is explained; %s", opened.hint)
        say_next(["sae-explain", options.runs[0]])
    return DONE


def typed_text(text: str, option: str) -> str:
    """Returns the text that was typed, or what standard input holds; ConfigError for none."""
    if text == STDIN:
        try:
            text = sys.stdin.buffer.read().decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{option}: standard input is no UTF-8 text: {error}") from None
    if not text:
        raise ConfigError(f"{option}: the text is empty; give some, such as 'The cat sat on the mat'")
    return text
