"""What all commands share: a config from what files say and overrides, messages, one-line errors and exit codes."""

import argparse
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import draccus

from sae.base.errors import ConfigError, Stopped
from sae.base.settings import decode, describe, merge, parse_value, set_dotted

from . import ended_by

T = TypeVar("T")
DONE, ERROR, BAD_USAGE = 0, 1, 2


def read_config(kind: type[T], said: dict[str, Any], overrides: list[str], defaults: T | None = None) -> T:
    """Returns defaults, what files say, then overrides ("--coder.selection.k 64" or "--coder.selection.k=64")."""
    data = merge(draccus.encode(defaults or kind()), said)
    for key, value in _pairs(overrides):
        set_dotted(data, key, parse_value(kind, key, value))
    return decode(kind, data)


def _pairs(overrides: list[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(overrides)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r}: expected --field value (see --help-fields)")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key}: its value is missing")
            value = rest.pop(0)
        pairs.append((key.replace("-", "_"), value))
    return pairs


def field_help(kind: type[Any]) -> str:
    """Returns one paragraph per config field: name, default, meaning."""
    return "\n".join(f"  --{name}  (default: {default})\n      {doc}" for name, default, doc in describe(kind))


def print_tables(results: dict[str, dict[str, Any]]) -> None:
    """Prints the figures of evaluated coders, a table for each."""
    from sae.evaluation.tables import table

    for name, found in results.items():
        rows = table(found)
        width = max(42, *(len(label) + 2 for label, _ in rows))
        print("\n".join(["", name, *(f"  {label:{width}}{text}" for label, text in rows)]))


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


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ConfigErrors, so that every command fails in the same way."""

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

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises ConfigError."""
        raise ConfigError(message)


def run(command: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 1 error, 2 bad usage or config, 75 stopped by a signal.

    Errors are one line on stderr; `--debug` adds the traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    _quiet_libraries()
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", force=True)
    for noisy in ("httpx", "httpx2", "huggingface_hub", "transformers", "datasets", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        with _interruptible():
            code = command(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except Stopped as stopped:
        print(f"stopped {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt as ended:
        number = ended.number if isinstance(ended, _Interrupted) else signal.SIGINT
        print(ended_by(number), file=sys.stderr)
        return 128 + number
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return DONE
        if debug:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return getattr(error, "exit_code", ERROR)


class _Interrupted(KeyboardInterrupt):
    """A signal came while nothing was under way that could be kept."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets SIGTERM end the block as Ctrl-C does; a second one, if the first got lost in an import, at once.

    Ranks of a launcher are left alone: one that waits for the others would not hear of it.
    """
    came: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        if came:
            os._exit(128 + number)
        came.append(number)
        raise _Interrupted(number)

    names = ("SIGINT", "SIGTERM") if os.environ.get("WORLD_SIZE", "1") == "1" else ()
    alone = threading.current_thread() is threading.main_thread()
    before = {name: signal.signal(getattr(signal, name), interrupt) for name in names if alone}
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if came:  # a library made an error of its own of it
            raise _Interrupted(came[0]) from error
        raise
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def _nobody_reads() -> bool:
    """Whether standard output is what broke: who read it has seen enough, and flushing the rest must not complain."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return True
    return False


def _quiet_libraries() -> None:
    """Keeps their bars out of what is no terminal, and the chatter of one that sets its own level; they look once."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (ValueError, RuntimeError, OSError)) else f"{type(error).__name__}: {text}"
