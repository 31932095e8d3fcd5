"""sae-steer: what a language model says with latents of a coder edited, beside what it says without."""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from sae.base.errors import ConfigError

from .naming import as_typed
from .parsing import Parser
from .prompting import typed_text
from .running import DONE, run
from .serving import add_serving, serve
from .telling import report

if TYPE_CHECKING:
    from interp.view.opening import Opened
    from sae.steering.edits import Edit
    from sae.steering.steer import Piece
    from sae.steering.steered import Steered

NEW_TOKENS = 40
ONE = ("latent", "how", "strength", "where")  # by which one edit is said
SERVER = ("port", "host")
SERVED = ("path", "serve", "model", "device", "trust_remote_code")
EPILOG = """examples:
  sae-steer RUN --latent 508 --strength 4 "The weather today"    # clamped to 4 at every token
  sae-steer RUN --latent 508 --strength 2x "The weather today"   # to twice its largest activation
  sae-steer RUN --latent 508 --kl 0.5 "The weather today"        # by as much as changes the model by 0.5 nats
  sae-steer RUN --serve                                          # OpenAI's protocol, with the field "steer"
  sae-steer RUN --edits '508=4, 17:add=2x, 9:ablate in answer, 3:scale=0.5 if 12>1' "The weather today"
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(command, argv)


def parser(serving: bool = False) -> Parser:
    """Returns what the command takes, with --serve no prompt."""
    parser = Parser("sae-steer", description=__doc__, epilog=EPILOG)
    parser.add_argument("path", metavar="RUN", help="an explained run, the folder of a run or coder, a released name")
    if not serving:
        parser.add_argument("prompt", metavar="PROMPT", help="what the model goes on from; - reads it from stdin")
    parser.add_argument("--latent", type=int, metavar="ID", help="the latent that is edited")
    parser.add_argument("--how", metavar="HOW", help="clamp (default), add, scale or ablate")
    parser.add_argument("--strength", metavar="S", help="a value, or so many times its largest activation: 2x")
    parser.add_argument(
        "--where", metavar="PART", help="both (default), prompt, or answer: from the prompt's last token"
    )
    parser.add_argument("--edits", metavar="EDITS", help="several latents at once, conditions: see the examples")
    parser.add_argument(
        "--kl",
        type=float,
        metavar="NATS",
        help="find the strength that gives this mean KL; one that is typed says its sign, and proportions of several",
    )
    parser.add_argument("--chat", action="store_true", help="the prompt is what a user says, by the model's template")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, metavar="N", help="at most (default: 40)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among so much of the probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, which both continuations share")
    parser.add_argument("--model", default="", metavar="NAME", help="the language model, if not the one of the run")
    parser.add_argument("--device", default="auto", help="where model and coder go: auto, cpu, cuda ...")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model run code that it ships")
    parser.add_argument(
        "--serve", action="store_true", help="let clients of OpenAI's protocol talk to the edited model"
    )
    add_serving(parser)
    parser.add_json()
    return parser


def command(argv: list[str]) -> int:
    """Parses and acts."""
    takes = parser(serving="--serve" in argv)
    options = takes.parse_args(argv)
    typed = [name for name, value in vars(options).items() if value != takes.get_default(name)]
    with as_typed(options, **_names(options)):
        for name in typed:
            if options.serve and name not in (*SERVED, *SERVER):
                raise ConfigError(f"{name}: it does not go with --serve, where each request says what is asked")
            if not options.serve and name in SERVER:
                raise ConfigError(f"{name}: it goes with --serve")
        if options.serve:
            return serve(options, options.path, with_page=False)
        return _act(options)


def _act(options: argparse.Namespace) -> int:
    prompt, edits = typed_text(options.prompt, "PROMPT"), _edits(options)

    from interp.view.opening import open_run
    from sae.lm.generation import check_drawing
    from sae.steering.hooks import Steering, check_steers
    from sae.steering.steer import check_asked, streamed

    check_drawing(options.new_tokens, options.temperature, options.top_p, least=1)
    for name, unused in (("top_p", options.top_p != 1), ("seed", options.seed != 0)):
        if unused and options.temperature == 0:
            raise ConfigError(f"{name}: nothing is drawn at temperature 0; give a --temperature above it, such as 0.7")
    opened = open_run(options.path, options.model, options.device, options.trust_remote_code)
    check_steers(opened.coder.spec)
    check_asked(edits, opened.coder.spec.d_sae, options.kl)
    names = ("new_tokens", "kl", "temperature", "top_p", "seed", "chat")
    how: dict[str, Any] = {name: getattr(options, name) for name in names}
    # What is wrong with a run is told before a model is loaded.
    largest, labels = opened.largest([edit.latent for edit in edits]), _labels(opened, edits)
    steering = Steering(opened.lm, opened.coder)
    found = _shown(streamed(steering, prompt, edits, largest=largest, **how), options.json)
    report(options.json, found.to_json(), [*found.figures, *labels])
    return DONE


def _edits(options: argparse.Namespace) -> "tuple[Edit, ...]":
    """Returns the edits that are typed; ConfigError names the option that is wrong."""
    from sae.steering.edits import as_edits

    one = {name: getattr(options, name) for name in ONE}
    said = [name for name, value in one.items() if value is not None]
    if options.edits is not None:
        if said:
            raise ConfigError(f"--{said[0]}: does not go with --edits, which says all of it")
        edits = as_edits(options.edits)
    elif options.latent is None:
        raise ConfigError("--latent: say which latent is edited, or --edits for several")
    else:
        edits = as_edits(one)
    if not edits:
        raise ConfigError("--edits: it holds no edit; say one, such as 508=4")
    return edits


def _names(options: argparse.Namespace) -> dict[str, str]:
    """Returns what was typed, by what errors call it."""
    names = (*ONE, "unit", "if")
    one = {f"edits.{name}": f"--{name}" if options.edits is None else "--edits" for name in names}
    return {"prompt": "PROMPT", "path": "RUN", **one}


def _shown(pieces: "Iterator[Piece | Steered | None]", as_json: Any) -> "Steered":
    """Prints both continuations while they are written, the plain one first, and returns the result."""
    from sae.steering.steered import Steered, in_lines

    found, last, held = None, "", ""  # what the steered one says while the plain one is not at its end
    begun: list[str] = []

    def say(side: str, text: str) -> None:
        head = "" if side in begun else "\n" * bool(begun) + f"{side:12} "
        begun.append(side)
        print(head + text, end="", flush=True)

    try:
        for piece in pieces:
            if isinstance(piece, Steered):
                found = piece
            elif piece is not None and not as_json:
                text = in_lines(piece.text)
                if piece.side == "plain":
                    say("plain", text)
                elif last == "steered":  # two in a row: the plain one has no more to say
                    say("steered", held + text)
                    held = ""
                else:
                    held += text
                last = piece.side
        if held:
            say("steered", held)
    finally:
        if begun:
            print()
    return cast("Steered", found)


def _labels(opened: "Opened", edits: "tuple[Edit, ...]") -> list[str]:
    """Returns what the explained run says of the edited latents, a line each."""
    if opened.run is None:
        return []
    found = opened.run.records({edit.latent for edit in edits})
    return [f"{f'latent {one.latent}':12} {one.told}" for one in found if one.text]


if __name__ == "__main__":
    sys.exit(main())
