"""What is said while work goes on: our loggers alone, on standard error, as much as was asked for."""

import logging
import subprocess
import sys

import pytest

from sae.base.errors import ConfigError
from sae.base.logs import asked_level, listen_if_asked, listening, quiet

PROGRAM = """
import logging, sys
import sae
{before}
sae.list_released, sae.list_released
for name in ("sae.lm", "interp.run", "another"):
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger(name), level)("%s %s", name, level)
print(len(logging.getLogger().handlers))
"""


@pytest.fixture
def said(monkeypatch):
    """Returns ($SAE_LOG, what the program does before) -> (lines on standard error, handlers of root)."""

    def run(level, before=""):
        if level is not None:
            monkeypatch.setenv("SAE_LOG", level)
        words = [sys.executable, "-c", PROGRAM.format(before=before)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return done.stderr.splitlines(), int(done.stdout)

    return run


def test_a_program_that_uses_us_hears_warnings_and_root_is_left_alone(said):
    assert said(None) == (["sae.lm warning", "interp.run warning", "another warning"], 0)


def test_sae_log_says_how_much_a_program_hears_of_us_alone(said):
    assert said("info")[0] == [
        *("sae.lm info", "sae.lm warning", "interp.run info", "interp.run warning", "another warning")
    ]
    assert said("Debug")[0][0] == "sae.lm debug"
    assert said("error")[0] == ["another warning"]


def test_what_a_program_has_set_up_itself_is_not_said_twice(said):
    lines, handlers = said("info", "logging.basicConfig(format='mine: %(message)s')")
    assert lines.count("mine: sae.lm info") == 1
    assert all(line.startswith("mine: ") for line in lines)
    assert handlers == 1


def test_a_level_that_is_none_is_one_line(said, monkeypatch):
    lines, _ = said("debgu")
    assert lines[0] == "SAE_LOG: 'debgu' is not one of debug, info, warning, error. Did you mean 'debug'?"
    assert lines[1:] == ["sae.lm warning", "interp.run warning", "another warning"]
    with pytest.raises(ConfigError, match="SAE_LOG: 'debgu' is not one of"):
        asked_level()
    monkeypatch.setenv("SAE_LOG", "")
    assert asked_level() is None


def test_listening_ends_with_the_block_and_takes_the_place_of_what_listens(monkeypatch, capsys):
    monkeypatch.setenv("SAE_LOG", "info")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    ours = logging.getLogger("sae")
    before = (ours.level, list(ours.handlers))
    listen_if_asked.cache_clear()
    try:
        listen_if_asked()
        with listening(logging.WARNING, "another"):
            assert quiet()
            ours.info("not heard")
            ours.warning("heard once")
            logging.getLogger("another").warning("heard too")
        assert not quiet()
        ours.info("heard again")
        assert capsys.readouterr().err.splitlines() == ["heard once", "heard too", "heard again"]
    finally:
        listen_if_asked.cache_clear()
        for name in ("sae", "interp"):
            logging.getLogger(name).setLevel(before[0])
            logging.getLogger(name).handlers = list(before[1])
