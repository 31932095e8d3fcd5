"""How every command runs: what it says and where, one-line errors, signals and exit codes."""

import logging
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from sae.base.errors import ConfigError, Stopped
from sae.base.logs import asked_level, listening
from sae.parallel.launch import launch
from sae.parallel.stopping import SIGNALS, early, put_back

from . import ended_by

DONE, ERROR, BAD_USAGE = 0, 1, 2
COMPLETE = "--complete"  # asked by shells: the words behind it are those of a line that is being typed
DEBUG, QUIET, VERBOSE = ("--debug",), ("-q", "--quiet"), ("-v", "--verbose")
NOISY = ("httpx", "httpx2", "huggingface_hub", "transformers", "datasets")
log = logging.getLogger(__package__)  # of all commands: the module that runs is called __main__


def run(command: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 1 error, 2 bad usage or config, 75 stopped by a signal.

    Results go to standard output, all else to standard error: as much as `--quiet` and `--verbose` or $SAE_LOG ask for.
    Errors are one line; `--debug` adds the traceback.
    """
    arguments = [one for word in (sys.argv[1:] if argv is None else argv) for one in _apart(word)]
    debug, quiet, verbose = (_taken(arguments, *names) for names in (DEBUG, QUIET, VERBOSE))
    _let_others_run()
    try:
        with ExitStack() as shown:
            shown.enter_context(listening(_level(quiet, verbose), log.name))
            shown.enter_context(_interruptible())
            try:
                code = command(arguments)
            except SystemExit as ended:  # so do --help and --version end
                code = ended.code if isinstance(ended.code, int) else ERROR if ended.code else DONE
                if isinstance(ended.code, str):
                    print(ended.code, file=sys.stderr)
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


def _apart(word: str) -> list[str]:
    """Returns the short options of all commands that one word may hold: -qv is -q and -v."""
    return [f"-{letter}" for letter in word[1:]] if re.fullmatch("-[qv]{2,}", word) else [word]


def _taken(arguments: list[str], *names: str) -> bool:
    """Returns whether an option of all commands was typed, wherever it stands, and takes it out."""
    found = [word for word in arguments if word in names and arguments[0] != COMPLETE]
    for word in found:
        arguments.remove(word)
    return bool(found)


def _level(quiet: bool, verbose: bool) -> int:
    """Returns from which level on our loggers are heard, and keeps other libraries from saying more than that."""
    asked = asked_level()
    if quiet and verbose:
        raise ConfigError("--quiet: does not go with --verbose; choose one")
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO if asked is None else asked
    if level > logging.DEBUG:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it sets a level of its own, and looks once
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is a line of ours, not a page of frames
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
    if level > logging.INFO or sys.stderr is None or not sys.stderr.isatty():  # bars of others
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return level if launch().rank == 0 else max(level, logging.WARNING)


def _let_others_run() -> None:
    """Has threads of PyTorch's products sleep when they have waited for one another for microseconds, not milliseconds.

    Where another process wants the same cores, each wait is else for one that cannot run: two trainings on two cores
    made steps of 240 ms, that take 13 ms alone and now 22 ms.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # which libgomp reads once, when torch is imported


class _Interrupted(KeyboardInterrupt):
    """A signal came while nothing was under way that could be kept."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets SIGTERM end the block as Ctrl-C does; a second one, if the first got lost in an import, at once.

    SIGUSR1, by which a scheduler asks for a checkpoint, is kept for what can stop and be continued. So are all of them
    where there are several ranks: one that ended by itself would leave the others waiting.
    """
    came: list[int] = []
    ranks, stopped = launch().world_size, False

    def interrupt(number: int, _frame: object) -> None:
        if came:
            os._exit(128 + number)
        came.append(number)
        raise _Interrupted(number)

    def keep(number: int, _frame: object) -> None:
        if early and (ranks < 2 or number == signal.SIGINT):
            os._exit(128 + number)
        early.append(signal.Signals(number).name)

    at_once = ("SIGINT", "SIGTERM") if ranks == 1 else ()
    names = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    handlers = {name: interrupt if name in at_once else keep for name in names}
    before = {name: signal.signal(getattr(signal, name), handler) for name, handler in handlers.items()}
    try:
        yield
    except Stopped:
        stopped = True
        raise
    except Exception as error:
        if came:  # a library made an error of its own of it
            raise _Interrupted(came[0]) from error
        raise
    finally:
        early.clear()
        put_back(before, stopped)


def _nobody_reads() -> bool:
    """Whether standard output is what broke: who read it has seen enough, and flushing the rest must not complain."""
    try:
        descriptor = sys.stdout.fileno()
        poll = select.poll()
    except (AttributeError, OSError, ValueError):  # there is none, it is no file, or this is no POSIX
        return False
    poll.register(descriptor, 0)
    if not any(happened & select.POLLERR for _, happened in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (ValueError, RuntimeError, OSError)) else f"{type(error).__name__}: {text}"
