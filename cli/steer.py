"""sae-steer: what a language model says with latents of a coder edited, beside what it says without."""

import sys

from sae.base.errors import ConfigError

from .parsing import Parser
from .running import run

EPILOG = """examples:
  sae-steer RUN --latent 508 --strength 4 "The weather today"       # clamped to 4 at every token
  sae-steer RUN --latent 508 --strength 2x "The weather today"      # to twice its largest activation
  sae-steer RUN --latent 508 --kl 0.5 "The weather today"           # by as much as changes the model by 0.5 nats
  sae-steer RUN --edits '508=4, 17:add=2x, 9:ablate in answer, 3:scale=0.5 if 12>1' "The weather today" """


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(command, argv)


def parser() -> Parser:
    """Returns what the command takes."""
    parser = Parser("sae-steer", description=__doc__, epilog=EPILOG)
    parser.add_argument("path", metavar="RUN", help="an explained run, the folder of a run or coder, a released name")
    parser.add_argument("prompt", metavar="PROMPT", help="what the model goes on from; - reads it from stdin")
    parser.add_argument("--latent", type=int, metavar="ID", help="the latent that is edited")
    parser.add_argument("--how", default="clamp", metavar="HOW", help="clamp (default), add, scale or ablate")
    parser.add_argument("--strength", metavar="S", help="a value, or so many times its largest activation: 2x")
    parser.add_argument("--edits", metavar="EDITS", help="several latents at once, as in the examples")
    parser.add_json()
    return parser


def command(argv: list[str]) -> int:
    """Parses and acts."""
    from sae.steering.edits import as_edits

    options = parser().parse_args(argv)
    said = {"latent": options.latent, "how": options.how, "strength": options.strength}
    as_edits(options.edits if options.edits else said)
    raise ConfigError("sae-steer: what steers is not there yet")


if __name__ == "__main__":
    sys.exit(main())
