"""sae-view: look at a run: its report, a page that asks the model, which latents fire on a text, a site to share."""

import argparse
import sys

from sae.base.errors import ConfigError

from .exchange import check_export
from .naming import as_typed
from .parsing import Parser
from .running import run
from .serving import add_serving, serve

REPORT, PROMPT, SERVE = "a report", "--prompt", "--serve"
STATIC, NEURONPEDIA = "--export static", "--export neuronpedia"
OF_MODES = {  # options, and all that they do something with
    ("out",): (REPORT,),
    ("top", "by", "latents", "chat"): (PROMPT,),
    ("model", "device", "trust_remote_code"): (PROMPT, SERVE, NEURONPEDIA),
    ("model_id", "source_id"): (NEURONPEDIA,),
    ("port", "host"): (SERVE,),
    ("json",): (REPORT, PROMPT, STATIC, NEURONPEDIA),
}
ORDERS = ("value", "fires", "effect")  # the largest value, the number of tokens, the effect on what follows
EPILOG = """examples:
  sae-view RUN                              # write report.html of a training or explained run
  sae-view RUN_A RUN_B                      # two runs side by side
  sae-view RUN --prompt "The cat sat"       # which latents fire on a text, with their labels
  sae-view RUN --serve                      # a page on this machine: prompts, search, steering, bookmarks
  sae-view RUN --export neuronpedia FOLDER  # what a local Neuronpedia imports; --export static: a site"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(command, argv)


def parser() -> Parser:
    """Returns what the command takes."""
    parser = Parser("sae-view", description=__doc__, epilog=EPILOG)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run or of an explained one")
    parser.add_argument("--out", metavar="FILE.html", help="where the report is written")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--prompt", metavar="TEXT", help="tell which latents fire on a text; - reads it from stdin")
    modes.add_argument("--serve", action="store_true", help="serve a page that asks the model")
    modes.add_argument("--export", nargs="+", metavar=("KIND", "FOLDER"), help="write neuronpedia or static files")
    asked = parser.add_argument_group("of --prompt")
    asked.add_argument("--top", type=int, default=20, metavar="N", help="latents that are told of (default: 20)")
    asked.add_argument("--by", choices=ORDERS, default="value", help="what comes first (default: value)")
    asked.add_argument("--latents", metavar="IDS", help="only these: ids and ranges, such as 508 or 3,17,40-49")
    asked.add_argument("--chat", action="store_true", help="the text is a user's message, in the model's chat template")
    model = parser.add_argument_group("of the language model, with --prompt, --serve and --export")
    model.add_argument("--model", default="", metavar="NAME", help="hub id or folder (default: what the run says)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda ... (default: auto)")
    model.add_argument("--trust-remote-code", action="store_true", help="let the model run code that it ships")
    export = parser.add_argument_group("of --export neuronpedia")
    export.add_argument("--model-id", default="", metavar="ID", help="its name of the model, such as gemma-2-2b")
    export.add_argument("--source-id", default="", metavar="ID", help="its name of the coder, such as 20-my-res-16k")
    add_serving(parser)
    parser.add_json()
    return parser


def command(argv: list[str]) -> int:
    """Parses and acts."""
    takes = parser()
    options = takes.parse_args(argv)
    if len(options.runs) > 1 and (options.prompt is not None or options.serve or options.export):
        raise ConfigError(f"RUN: {len(options.runs)} runs; --prompt, --serve and --export take one")
    check_export(options)
    _check_modes(options, takes)
    with as_typed(options, text=PROMPT, path="RUN", run_dir="RUN"):
        return _act(options)


def _check_modes(options: argparse.Namespace, takes: Parser) -> None:
    """Raises ConfigError for an option that does nothing with what is asked for."""
    mode = _mode(options)
    for names, modes in OF_MODES.items():
        typed = [name for name in names if getattr(options, name) != takes.get_default(name)]
        if typed and mode not in modes:
            listed = " or ".join([", ".join(modes[:-1]), modes[-1]] if modes[1:] else modes)
            raise ConfigError(f"--{typed[0].replace('_', '-')}: it goes with {listed}")


def _mode(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        return PROMPT
    if options.serve:
        return SERVE
    return f"--export {options.export[0]}" if options.export else REPORT


def _act(options: argparse.Namespace) -> int:
    if options.prompt is not None:
        from .prompting import tell_prompt

        return tell_prompt(options)
    if options.serve:
        return serve(options, options.runs[0], with_page=True)
    if options.export:
        from .exchange import export

        return export(options)
    from .reports import report_on

    return report_on(options)


if __name__ == "__main__":
    sys.exit(main())
