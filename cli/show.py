"""sae-explain show: what the folder of a run says of a latent."""

import argparse
import shlex
from pathlib import Path

from .parsing import Parser
from .running import DONE
from .telling import report, wants_colors

ABOUT = "a latent's labels, scores, firing statistics and windows, from the folder of a run alone"


def parser() -> Parser:
    """Returns what the command takes."""
    parser = Parser("sae-explain show", description=ABOUT)
    parser.add_argument("path", help="folder of an explained run, or of its coder")
    parser.add_argument("latents", nargs="+", metavar="ID", help="latents: ids and ranges, such as 508 or 40-49")
    parser.add_json()
    parser.set_defaults(act=show)
    return parser


def show(options: argparse.Namespace) -> int:
    """Shows latents."""
    from interp.run.rundir import run_folder
    from interp.view.explained import ExplainedRun
    from interp.view.terminal import lines

    folder = run_folder(Path(options.path))
    run = ExplainedRun(folder)
    asked = run.ids(",".join(dict.fromkeys(options.latents)))
    config = folder / "config.yaml"
    again = f"sae-explain --config {shlex.quote(str(config))} --latents=" if config.is_file() else ""
    if options.json:
        report(True, list(run.records(asked)), ())
        return DONE
    for number, record in enumerate(run.records(asked)):
        command = again and f"{again}{record.latent}"
        report(False, record, [*([""] if number else []), *lines(record, command, wants_colors())])
    return DONE
