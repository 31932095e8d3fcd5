"""sae-explain compare: two explained coders beside each other."""

import argparse
from pathlib import Path
from typing import Any

from sae.base.errors import ConfigError

from .parsing import JSON, Parser
from .running import DONE, log
from .telling import plain, report

TOKENS = 100_000
ABOUT = "which latents of two explained coders are the same, and whether their explanations say so"


def parser() -> Parser:
    """Returns what the command takes."""
    parser = Parser("sae-explain compare", description=ABOUT)
    parser.add_argument("a", help="folder of an explained run, or of its coder")
    parser.add_argument("b", help="the other one")
    parser.add_argument("--explainer", metavar="NAME", help="whose explanations (default: llm, or the first one there)")
    parser.add_argument("--encoder", metavar="MODEL", default="tfidf", help="sentence encoder (default: %(default)s)")
    parser.add_argument("--encoder-url", metavar="URL", help="a server that runs it (default: this process)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens for co-activation (default: %(default)s)")
    parser.add_json("with a file, write all there (default: compare-B.json in A's folder)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model run code that it ships")
    parser.set_defaults(act=compare_runs)
    return parser


def compare_runs(options: argparse.Namespace) -> int:
    """Compares two runs."""
    if options.tokens < 1:
        raise ConfigError(f"--tokens: {options.tokens} must be at least 1")
    from interp.client.config import EndpointConfig
    from interp.run.compare import compare
    from interp.run.rundir import run_folder
    from sae.base.files import write_json
    from sae.base.paths import check_file

    via = ("http", (options.encoder_url,)) if options.encoder_url else ("local", ())
    a, b = (run_folder(Path(path)) for path in (options.a, options.b))
    encoder = EndpointConfig(options.encoder, *via)
    named = options.json not in (None, JSON)
    target = Path(options.json).expanduser() if named else a / f"compare-{b.resolve().parent.name}.json"
    check_file(target, "--json")
    found = compare(a, b, encoder, options.explainer, options.tokens, options.trust_remote_code)
    write_json(target, plain(found))
    report(options.json == JSON, found, _lines(found))
    log.info("json         %s", target)
    return DONE


def _lines(found: dict[str, Any]) -> list[str]:
    from interp.records import Measure

    lines = [f"{found['latents'][0]} and {found['latents'][1]} explained latents"]
    for name, value in found["mmcs"].items():
        if value is not None:
            lines.append(f"MMCS {name.replace('_', ' ')}   {value['value']:.3f}, random directions {value['null']:.3f}")
    lines += [found["doubt"]] if found["doubt"] else []
    for name, matching in found["matchings"].items():
        parts = {key: str(Measure(**value)) for key, value in matching["similarity"].items()}
        lines.append(
            f"matched by {name}: mean {matching['mean_strength']:.3f}; explanations alike {parts['value']}, "
            f"pairs at random {parts['null']}, lift {parts['lift']}"
        )
    return lines
