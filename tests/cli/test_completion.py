"""Completion as shells ask for it, and in the shells themselves where they are installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli import evaluate, explain, load, train
from sae.base.plugins import names
from sae.selection import Selection

ROOT = Path(__file__).parents[2]
L0 = ("type", "weight", "target_l0", "warmup_share")
COMMANDS = {"sae-train": train, "sae-eval": evaluate, "sae-explain": explain, "sae-load": load}


@pytest.fixture
def complete(capsys):
    """Returns a line as typed so far -> what its last word may become."""

    def run(line):
        command, *words = line.split(" ")
        assert COMMANDS[command].main(["--complete", *words]) == 0
        return capsys.readouterr().out.split()

    return run


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("sae-train --coder.sel", ["--coder.selection.", "--coder.select_by_decoder_norm"]),
        ("sae-train --coder.selection.ty", ["--coder.selection.type"]),
        ("sae-train --coder.selection.type ju", ["jumprelu"]),
        ("sae-train --coder.selection.type=ju", ["--coder.selection.type=jumprelu"]),
        ("sae-train --seed 3 --text.lay", ["--text.layout"]),
        ("sae-train --text.layout ", ["packed", "one_per_row"]),
        ("sae-train --coder.skip ", ["true", "false"]),
        ("sae-train --coder.objectives.l0.", [f"--coder.objectives.l0.{name}" for name in L0]),
        ("sae-train --coder.objectives.mine.type l0", ["l0"]),
        ("sae-train --config ju", ["jumprelu"]),
        ("sae-train --on smol", ["smollm2"]),
        ("sae-train --dry", ["--dry-run"]),
        ("sae-train --help-fields jum", ["jumprelu"]),
        ("sae-train --resume ", []),
        ("sae-train --no-such.field ", []),
        ("sae-eval RUN --optim", []),
        ("sae-eval RUN --text.sou", ["--text.source"]),
        ("sae-explain sh", ["show"]),
        ("sae-explain show RUN --js", ["--json"]),
        ("sae-explain RUN --scorers.s.type sur", ["surprisal"]),
        ("sae-explain --config key", ["keyless"]),
        ("sae-load do", ["doctor"]),
        ("sae-load show gpt2-small-res-j", ["gpt2-small-res-jb", "gpt2-small-res-jb-feature-splitting"]),
        ("sae-load list --model google/gemma-2-2", ["google/gemma-2-27b", "google/gemma-2-2b"]),
        ("sae-load show x --pre-bias d", ["decoder"]),
    ],
)
def test_words_by_what_stands_before_them(complete, line, found):
    assert complete(line) == found


def test_values_of_a_type_are_the_plug_ins(complete):
    assert complete("sae-train --coder.selection.type ") == list(names(Selection))


SHELLS = {  # what is typed there, and what comes of it
    "bash": """
source script
try() {  # a line, and its words as readline takes them apart
    COMP_LINE="$1"; shift
    COMP_POINT=${#COMP_LINE}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _sae_train_complete 2> /dev/null
    echo "${COMPREPLY[@]}"
}
try "sae-train --coder.selection.ty" sae-train --coder.selection.ty
try "sae-train --coder.selection.type ju" sae-train --coder.selection.type ju
try "sae-train --config=ju" sae-train --config = ju
try "sae-train --resume " sae-train --resume ""
""",
    "fish": """
source script
complete -C "sae-train --coder.selection.ty"
complete -C "sae-train --coder.selection.type ju"
complete -C "sae-train --config=ju"
complete -C "sae-train --resume scri"
""",
}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_in_the_shell_itself(shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    for name, module in COMMANDS.items():
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module.__name__} "$@"\n')
        script.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    made = subprocess.run(
        ["sae-train", "--completion", shell], capture_output=True, text=True, env=environment, check=True
    )
    (tmp_path / "script").write_text(made.stdout)
    done = subprocess.run(
        [shell, "-c", SHELLS[shell]], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    found = [line.strip() for line in done.stdout.splitlines()]
    if shell == "bash":  # which completes files by itself where nothing is offered
        assert found == ["--coder.selection.type", "jumprelu", "jumprelu", ""]
    else:
        assert found == ["--coder.selection.type", "jumprelu", "--config=jumprelu", "script"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_those_of_the_command(command, shell, capsys):
    assert COMMANDS[command].main(["--completion", shell]) == 0
    printed = capsys.readouterr().out
    assert f"{command} --complete" in printed
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=printed, text=True, check=True)
