"""sae-view as users type it: an option that would do nothing is refused, before anything is read."""

import pytest
from rigs.runs import error_of

from cli.view import OF_MODES, main, parser

MODES = {
    "a report": [],
    "--prompt": ["--prompt", "a"],
    "--serve": ["--serve"],
    "--export static": ["--export", "static", "site"],
    "--export neuronpedia": ["--export", "neuronpedia"],
}
VALUES = {"out": "a.html", "top": "3", "by": "fires", "latents": "5", "port": "1", "host": "::1"}
FLAGS = ("chat", "trust_remote_code", "json")


def test_an_option_that_does_nothing_in_a_mode_is_one_line(capsys):
    for names, modes in OF_MODES.items():
        for name in names:
            option = f"--{name.replace('_', '-')}"
            for mode, words in MODES.items():
                value = [] if name in FLAGS else [VALUES.get(name, "x")]
                code = main(["no-such-run", *words, option, *value])
                said = error_of(capsys.readouterr().err)
                assert code == 2
                assert said.startswith(f"{option}: it goes with ") == (mode not in modes), (mode, option, said)


def test_all_options_are_of_some_mode():
    known = {name for names in OF_MODES for name in names} | {"runs", "prompt", "serve", "export"}
    common = {"help", "quiet", "verbose", "debug", "version", "completion"}
    assert {action.dest for action in parser()._actions} - common == known


@pytest.mark.parametrize("words", [[], ["--prompt", "a"], ["--serve"]])
def test_what_is_meant_by_the_name_of_a_run_is_a_folder(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run_1.log").touch()
    assert main(["run_1", *words]) == 2
    assert "Did you mean" not in capsys.readouterr().err
    (tmp_path / "run_12").mkdir()
    assert main(["./run_1", *words]) == 2
    assert "Did you mean 'run_12'?" in capsys.readouterr().err
