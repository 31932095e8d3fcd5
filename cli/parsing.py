"""What is typed: the options that all commands have, those of released coders, and config fields beside them."""

import argparse
import sys
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from sae.base.errors import ConfigError, nearest
from sae.base.fields import Field, fields
from sae.base.settings import choose

from .helping import tell_fields, told_beside
from .running import COMPLETE, DEBUG, QUIET, VERBOSE
from .typed import check, field_of

SHELLS = ("bash", "zsh", "fish")
JSON = "-"  # the value of --json where no file is named


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ConfigErrors, so that every command fails in the same way.

    Args:
        prog: the command as it is typed.
        config: the class whose fields are options too, "module:Class"; none: there are no fields.
        groups: which of its groups are used; none: all.
        commands: the parsers of its subcommands by name, where argparse does not know them.
        settings: of argparse.

    Of the options that it adds, `run` has acted on --quiet, --verbose and --debug before anything is parsed.
    """

    def __init__(
        self,
        prog: str,
        config: str = "",
        groups: tuple[str, ...] = (),
        commands: "dict[str, Parser] | None" = None,
        **settings: Any,
    ) -> None:
        super().__init__(prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.config, self.groups, self.commands = config, groups, commands or {}
        self.register("type", int, _whole)
        common = self.add_argument_group("of all commands")
        common.add_argument(*QUIET, action="store_true", help="warnings and errors only, no bars")
        common.add_argument(*VERBOSE, action="store_true", help="also what helps to find a fault")
        common.add_argument(*DEBUG, action="store_true", help="show tracebacks")
        common.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
        if " " not in prog:
            common.add_argument("--completion", action=_Completion, choices=SHELLS, help="print a script for the shell")
        if config:
            about = "print the fields, or those of a group or plug-in, and exit"
            self.add_argument("--help-fields", nargs="?", const="", metavar="GROUP", help=about)

    @cached_property
    def table(self) -> list[Field]:
        """Returns the config fields that are options."""
        found = fields(self.config) if self.config else []
        used = tuple(f"{group}." for group in self.groups)
        return [field for field in found if not used or f"{field.path}.".startswith(used)]

    @property
    def options(self) -> list[str]:
        """Returns the options that are no fields."""
        return list(self._option_string_actions)

    def add_json(self, file: str = "") -> None:
        """Adds --json: results as JSON on standard output; --json FILE.json where `file` says what that writes."""
        if file:
            what = f"print JSON; {file}"
            self.add_argument("--json", nargs="?", const=JSON, metavar="FILE.json", help=what)
        else:
            self.add_argument("--json", action="store_const", const=JSON, help="print JSON")

    def parse_fields(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Returns (options, config fields as they were typed): the value behind a field is no positional word.

        ConfigError for what is no field, before anything heavy is imported. --help-fields ends the command.
        """
        words: list[str] = []
        for word in argv:
            last = words[-1] if words else ""
            named = last.startswith("--") and "=" not in last and self._spelled(last) not in self._option_string_actions
            if named and len(last) > 2 and not word.startswith("--") and words[0] != COMPLETE:
                words[-1] = f"{last}={word}"
            else:
                words.append(word)
        if any(word.partition("=")[0] == "--help-fields" for word in map(self._spelled, words)):
            for action in self._get_positional_actions():
                action.required = False
        options, typed = self.parse_known_args(words)
        if options.help_fields is not None:
            tell_fields(self.table, options.help_fields, options.json)
            self.exit()
        unused = [one for one in fields(self.config) if self.groups and one not in self.table]
        for word in typed:
            if field_of(word.removeprefix("--").partition("=")[0].replace("-", "_"), unused):
                self.error(f"{word.partition('=')[0]}: not used here; fields of {', '.join(self.groups)} are")
        check(typed, self.table, self.options)
        return options, typed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Returns (options, words that are none), as argparse does; what follows --json is its value if it is .json."""
        words = list(sys.argv[1:] if args is None else args)
        if words[:1] == [COMPLETE]:
            from .completion import candidates

            print("".join(f"{word}\n" for word in candidates(self, words[1:])), end="")
            self.exit()
        words = [self._spelled(word) for word in words]
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

    def format_help(self) -> str:
        """Returns what --help prints: also the subcommands and the groups of fields."""
        return super().format_help() + told_beside(self.commands, self.table)

    def _spelled(self, word: str) -> str:
        """Returns an option as it is called, which may be typed with underscores, as fields may with dashes."""
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        known = (
            name.startswith("--") and name not in self._option_string_actions and dashed in self._option_string_actions
        )
        return f"{dashed}{equals}{value}" if known else word

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None:
            choose("/".join(action.option_strings) or str(action.metavar or action.dest), value, action.choices)

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises ConfigError."""
        more = f"; {self.prog} --help says what they are" if message.startswith("the following arguments are") else ""
        raise ConfigError(message.removeprefix("argument ") + more)


def _whole(text: str) -> int:
    """Returns a whole number however it is written: 1000000, 1_000_000 or 1e6."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        return int(float(text))


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


class _Completion(argparse.Action):
    """Prints what makes a shell complete a command."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, __: Any = None) -> None:
        from .completion import script

        print(script(parser.prog, shell))
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
