"""How commands run: results on standard output, the rest on standard error, as much of it as was asked for."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli import evaluate, explain, load, running, train
from sae.base.progress import Progress
from sae.base.version import version

ROOT = Path(__file__).parents[2]
COMMANDS = (train, evaluate, explain, load)


def talk(_argv):
    for name in ("sae.lm", "interp.run", running.log.name, "another"):
        logger = logging.getLogger(name)
        logger.debug("%s debug", name)
        logger.info("%s info", name)
        logger.warning("%s warning", name)
    print("a result")
    return 0


@pytest.mark.parametrize(
    ("options", "variable", "heard"),
    [
        ([], None, ("info", "warning")),
        (["-q"], None, ("warning",)),
        (["--quiet"], "debug", ("warning",)),
        (["-v"], "error", ("debug", "info", "warning")),
        (["--verbose"], None, ("debug", "info", "warning")),
        ([], "error", ()),
        ([], "warning", ("warning",)),
    ],
)
def test_as_much_is_said_as_was_asked_for(monkeypatch, capsys, options, variable, heard):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("another"), "propagate", False)
    if variable:
        monkeypatch.setenv("SAE_LOG", variable)
    assert running.run(talk, options) == 0
    printed = capsys.readouterr()
    assert printed.out == "a result\n"
    names = ("sae.lm", "interp.run", "cli")
    told = [line for line in printed.err.splitlines() if line.startswith(names)]
    assert told == [f"{name} {level}" for name in names for level in heard]


@pytest.mark.parametrize(("ended", "code"), [(None, 0), (3, 3), ("no such thing", 1)])
def test_an_exit_has_the_code_that_python_gives_it(capsys, ended, code):
    assert running.run(lambda _: sys.exit(ended), []) == code
    assert capsys.readouterr().err == ("no such thing\n" if code == 1 else "")


def test_short_options_may_be_one_word(capsys):
    assert running.run(talk, ["-qq"]) == 0
    assert "info" not in capsys.readouterr().err
    assert running.run(talk, ["-qv"]) == 2
    assert capsys.readouterr().err == "error: --quiet: does not go with --verbose; choose one\n"


def test_what_was_asked_for_twice_or_is_no_level_is_one_line(monkeypatch, capsys):
    assert running.run(talk, ["-q", "-v"]) == 2
    assert capsys.readouterr().err == "error: --quiet: does not go with --verbose; choose one\n"
    monkeypatch.setenv("SAE_LOG", "loud")
    assert running.run(talk, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: SAE_LOG: 'loud' is not one of debug, info, warning, error.")
    assert running.run(talk, ["-q"]) == 2


def test_loggers_and_root_are_afterwards_what_they_were():
    loggers = [logging.getLogger(name) for name in ("", "sae", "interp", "cli")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    seen = []
    assert running.run(lambda argv: seen.append(list(logging.getLogger().handlers)) or 0, ["-v"]) == 0
    assert seen == [before[0][1]]
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == before


@pytest.mark.parametrize(("options", "bar"), [([], True), (["-q"], False), (["-v"], True)])
def test_bars_follow(monkeypatch, capsys, options, bar):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)

    def command(_argv):
        with Progress("reading", 3, "rows") as progress:
            progress.update(3)
        return 0

    assert running.run(command, options) == 0
    assert ("reading: " in capsys.readouterr().err) == bar


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--help"],
        ["load", "list"],
        pytest.param(["train", "--list-configs"], marks=pytest.mark.slow),
        *(pytest.param([module, "--version"], marks=pytest.mark.slow) for module in ("train", "evaluate", "explain")),
        *(pytest.param([module, "--help"], marks=pytest.mark.slow) for module in ("evaluate", "explain", "load")),
    ],
    ids=" ".join,
)
def test_a_reader_that_has_seen_enough_hears_no_complaint(words):
    command = f"import time; from cli.{words[0]} import main; time.sleep(.2); raise SystemExit(main({words[1:]!r}))"
    argv = [sys.executable, "-c", command]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        process.stdout.close()
        assert process.wait() == 0
        assert process.stderr.read() in ("", "next         sae-load show RELEASE\n")


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_every_command_tells_its_version(module, capsys):
    assert module.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sae-interp {version()}\n"


def test_subcommands_have_the_options_of_all(capsys):
    commands = [(explain, name) for name in ("show", "merge", "compare", "import")]
    commands += [(load, name) for name in ("list", "show", "fetch", "convert", "push", "doctor")]
    for module, name in commands:
        assert module.main([name, "--help"]) == 0
        told = capsys.readouterr().out
        for option in ("-q, --quiet", "-v, --verbose", "--debug", "--version", "--json"):
            assert option in told, (name, option)


@pytest.mark.parametrize("words", [["load", "list"], ["explain", "--list-configs"]])
def test_json_is_all_that_is_on_standard_output(words):
    command = [sys.executable, "-m", f"cli.{words[0]}", *words[1:], "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert len(json.loads(done.stdout)) > 4


@pytest.mark.slow
@pytest.mark.parametrize(("given", "short"), [({}, True), ({"OMP_WAIT_POLICY": "active"}, False)])
def test_threads_that_wait_let_others_run_unless_they_are_told_not_to(given, short):
    environment = {**os.environ, **given, "OMP_DISPLAY_ENV": "VERBOSE"}
    environment.pop("GOMP_SPINCOUNT", None)
    argv = [sys.executable, "-m", "cli.train", "--dry-run"]
    said = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=True, env=environment).stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("this PyTorch has other threads than libgomp's")
    assert ("GOMP_SPINCOUNT = '1000'" in said) == short


def test_commands_are_imported_without_what_has_threads():
    names = [f"cli.{module.__name__.rpartition('.')[2]}" for module in COMMANDS]
    program = f"import sys, importlib; [importlib.import_module(n) for n in {names}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_an_option_before_the_command_is_told_its_place(capsys):
    assert load.main(["--json", "list"]) == 2
    assert capsys.readouterr().err == "error: --json: its place is behind the name of the command\n"
    assert load.main(["-q", "list", "--model", "gpt2"]) == 0
    assert capsys.readouterr().err == ""
