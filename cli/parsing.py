"""What is typed: the options that all commands have, those of released coders, and config fields beside them."""

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from sae.base.errors import ConfigError, nearest
from sae.base.settings import choose

from .running import DEBUG, QUIET, VERBOSE

JSON = "-"  # the value of --json where no file is named


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ConfigErrors, so that every command fails in the same way.

    Of the options that it adds, `run` has acted on --quiet, --verbose and --debug before anything is parsed.
    """

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        common = self.add_argument_group("of all commands")
        common.add_argument(*QUIET, action="store_true", help="warnings and errors only, no bars")
        common.add_argument(
            *VERBOSE, action="store_true", help="also what helps to find a fault ($SAE_LOG sets either)"
        )
        common.add_argument(*DEBUG, action="store_true", help="show tracebacks")
        common.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")

    def add_json(self, file: str = "") -> None:
        """Adds --json: results as JSON on standard output; --json FILE.json where `file` says what that writes."""
        if file:
            what = f"print JSON; {file}"
            self.add_argument("--json", nargs="?", const=JSON, metavar="FILE.json", help=what)
        else:
            self.add_argument("--json", action="store_const", const=JSON, help="print JSON")

    def parse_fields(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Returns (options, config fields as they were typed): the value behind a field is no positional word."""
        words: list[str] = []
        for word in argv:
            last = words[-1] if words else ""
            named = last.startswith("--") and "=" not in last and last not in self._option_string_actions
            if named and len(last) > 2 and not word.startswith("--"):
                words[-1] = f"{last}={word}"
            else:
                words.append(word)
        return self.parse_known_args(words)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Returns (options, words that are none), as argparse does; what follows --json is its value if it is .json."""
        words = list(sys.argv[1:] if args is None else args)
        may_be_file = getattr(self._option_string_actions.get("--json"), "nargs", None) == "?"
        for i, word in enumerate(words):
            if may_be_file and word == "--json" and not [*words, ""][i + 1].endswith(".json"):
                words[i] = f"--json={JSON}"
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Returns the options; ConfigError names what is none, and the nearest that is."""
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            known = getattr(options, "parser", self)._option_string_actions
            self.error(f"{rest[0]}: {_why_not(rest[0].partition('=')[0], known)}")
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None:
            choose("/".join(action.option_strings) or str(action.metavar or action.dest), value, action.choices)

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises ConfigError."""
        raise ConfigError(message)


def _why_not(word: str, known: Iterable[str]) -> str:
    """Returns what is wrong with a word that is none of the options of a command."""
    if word in known:
        return "its place is behind the name of the command"
    return f"no such option.{nearest(word, known)}" if word.startswith("-") else "one word too many"


class _Version(argparse.Action):
    """Prints the version, which is read only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from sae.base.version import NAME, version

        print(f"{NAME} {version()}")
        parser.exit()


def add_hints(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say of a released coder what its files do not, and which commit is meant."""
    parser.add_argument("--revision", metavar="COMMIT", help="commit, branch or tag on the hub")
    parser.add_argument("--site", metavar="HOOK", help="where it reads, if its files do not say")
    parser.add_argument("--pre-bias", choices=("none", "decoder", "own"), help="what is subtracted before the encoder")
    parser.add_argument("--scale", type=float, metavar="S", help="factor on its inputs, where no file has it")
    parser.add_argument("--processed", action=argparse.BooleanOptionalAction, help="its model had centered weights")
    parser.add_argument(
        "--normalization", metavar="KIND", help="SAELens' normalize_activations, if its config is wrong"
    )
    parser.add_argument("--format", metavar="NAME", help="its format, of files that look like several")


def hints(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what was typed for the options of `add_hints`, as `sae.load` takes it."""
    names = ("site", "pre_bias", "scale", "processed", "normalization", "format")
    return {name: getattr(options, name) for name in names}
