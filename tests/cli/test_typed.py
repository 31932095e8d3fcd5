"""What is typed for fields and is none: told in one line, with what was meant, within a second and without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from cli import evaluate, explain, load, train
from cli.typed import USUAL, pairs
from sae.base.errors import ConfigError
from sae.base.fields import fields

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--foo", "--foo: no such field; --help-fields lists all"),
        ("--foo 3", "--foo: no such field; --help-fields lists all"),
        ("--lr 1e-3", "--lr: no such field. Did you mean --optim.lr?"),
        ("--k 64", "--k: no such field. Did you mean --coder.selection.k?"),
        ("--coder.selecton.k 64", "--coder.selecton.k: no such field. Did you mean --coder.selection.k?"),
        ("--coder.k=64", "--coder.k: no such field. Did you mean --coder.selection.k?"),
        ("--batch-tokns 64", "--batch-tokns: no such field. Did you mean --batch_tokens?"),
        ("--learning-rate 1", "--learning-rate: no such field. Did you mean --optim.lr?"),
        ("--output_dir x", "--output_dir: no such field. Did you mean --run_dir?"),
        ("--optim.zzz 1", "--optim.zzz: no such field. Fields of optim: kind, lr, "),
        ("--dry-rn", "--dry-rn: no such field. Did you mean --dry-run?"),
        ("-config topk", "-config: no such option. Did you mean --config?"),
        ("-coder.selection.k 3", "-coder.selection.k: options begin with two dashes: --coder.selection.k"),
        ("-lr 3", "-lr: options begin with two dashes; no such field. Did you mean --optim.lr?"),
        ("-x", "-x: no such option."),
        ("--no-skip", "--no-skip: no such option; to turn it off: --coder.skip false"),
        ("--no-coder.skip", "--no-coder.skip: no such option; to turn it off: --coder.skip false"),
        ("--no-dry-run", "--no-dry-run: no such option; --dry-run is off unless it is typed"),
        ("--coder.selection.k", "--coder.selection.k: its value is missing, such as --coder.selection.k 32"),
        ("--tokens --seed 3", "--tokens: its value is missing, such as --tokens 1000000"),
        ("--coder.skip", "--coder.skip: its value is missing, such as --coder.skip true"),
        ("--grid", "--grid: its value is missing, such as --grid '{A: B}'"),
        ("--text.layout", "--text.layout: its value is missing, such as --text.layout packed"),
        ("--model", "--model: its value is missing, such as --model '{name: quickstart}'"),
        ("--activations.sites a b", "'b': a list goes in brackets: --activations.sites '[A, b]'"),
        ("coder.selection.k 3", "'coder.selection.k': expected --field value; did you mean --coder.selection.k?"),
        ("smollm2", "'smollm2': expected --field value; did you mean --on smollm2?"),
        ("jumprelu", "'jumprelu': expected --field value; did you mean --config jumprelu?"),
        ("mine.yaml", "'mine.yaml': expected --field value; did you mean --config mine.yaml?"),
        ("something", "'something': one word too many; expected --field value"),
        ("--config", "--config: expected one argument"),
        ("--config topkk", "--config: no file and no shipped config 'topkk'. Did you mean 'topk'?"),
        ("--on smolm2", "--on: no file about a model 'smolm2'. Did you mean 'smollm2'?"),
        ("dry-run", "'dry-run': expected --field value; did you mean --dry-run?"),
        ("--coder.selection.type topkk", "coder.selection.type: 'topkk' is not one of "),
        ("--coder.objectives.mine.type l00", "coder.objectives.mine.type: 'l00' is not one of "),
        ("--coder.objectives.mine.wieght 1", "--coder.objectives.mine.wieght: no such field. Did you mean --coder.obj"),
    ],
)
def test_what_is_no_field_is_told_with_what_was_meant(typed, told, capsys):
    assert train.main(typed.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}")


@pytest.mark.parametrize(
    ("command", "typed", "told"),
    [
        (explain, "shwo x 3", "'shwo': neither a folder nor a command. Did you mean 'show'?"),
        (explain, "runs/x --latnts 3", "--latnts: no such field. Did you mean --latents?"),
        (explain, "runs/x --modle.name y", "--modle.name: no such field. Did you mean --model.name?"),
        (explain, "show x 3 --jsn", "--jsn: no such option. Did you mean '--json'?"),
        (explain, "merge x y", "y: one word too many"),
        (evaluate, "x --tokns 3", "--tokns: no such field. Did you mean --tokens?"),
        (evaluate, "x --text.sorce y", "--text.sorce: no such field. Did you mean --text.source?"),
        (
            evaluate,
            "x --coder.selection.k 3",
            "--coder.selection.k: not used here; fields of model, second_model, text",
        ),
        (load, "shw x", "COMMAND: 'shw' is not one of "),
        (explain, "runs/x keyless", "'keyless': expected --field value; did you mean --config keyless?"),
        (explain, "runs/x topk", "'topk': one word too many; "),
        (
            explain,
            "runs/x --config keylss",
            "--config: no file and no shipped config 'keylss'. Did you mean 'keyless'?",
        ),
        (evaluate, "", "the following arguments are required: path; sae-eval --help says what they are"),
        (evaluate, "x --tokens many", "--tokens: invalid int value: 'many'"),
        (evaluate, "x --tokens 1.5", "--tokens: invalid int value: '1.5'"),
        (evaluate, "x --tokens 0e3", "--tokens: 0 must be at least 1"),
        (load, "list --modl x", "--modl: no such option. Did you mean '--model'?"),
    ],
)
def test_every_command_tells_it(command, typed, told, capsys):
    assert command.main(typed.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}")


@pytest.mark.parametrize(
    "typed",
    [
        *("--coder.selection.k=3", "--coder.objectives.mine.type l0", "--coder.objectives.l0.weight 2", "--grid.a 3"),
        *("--coder.objectives {}", "--batch-tokens 64", "--print_config"),
    ],
)
def test_what_is_a_field_passes(typed, capsys, monkeypatch):
    monkeypatch.setattr("cli.train.recipe", lambda *_: {"grid": 3})  # refused once the fields are known
    assert train.main(typed.split()) == 2
    assert "such field" not in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["--help-fields", "--help_fields text", "--help-fields=text.source --json"])
def test_fields_are_told_whatever_else_is_missing(typed, capsys):
    assert evaluate.main(typed.split()) == 0
    assert "text.source" in capsys.readouterr().out


def test_other_names_lead_to_fields():
    paths = {one.path for one in fields("sae.training.config:TrainConfig")}
    assert set(USUAL.values()) <= paths
    assert not set(USUAL) & paths


def test_values_that_begin_with_dashes_stand_behind_an_equals_sign():
    assert pairs(["--text.column=--x", "--seed", "-1"]) == [("text.column", "--x"), ("seed", "-1")]
    with pytest.raises(ConfigError, match=r"--text\.column: its value is missing"):
        pairs(["--text.column", "--x"])


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["train", "--help"],
            ["train", "--foo", "3"],
            ["train", "--help-fields"],
            ["train", "--coder.selecton.k", "3"],
        ),
        *(
            ["explain", "--help"],
            ["explain", "x", "--foo", "3"],
            ["evaluate", "x", "--foo", "3"],
            ["train", "--version"],
        ),
    ],
    ids=" ".join,
)
def test_it_takes_no_torch(words):
    code = f"""
import sys
from cli.{words[0]} import main
main({words[1:]!r})
print("LOADED", *[name for name in ("torch", "transformers", "datasets", "pyarrow", "scipy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_help_lists_commands_and_groups_and_fields_by_group(capsys):
    assert explain.main(["--help"]) == 0
    told = capsys.readouterr().out
    for name in ("show", "merge", "compare", "import", "evidence", "models"):
        assert f"\n  {name} " in told
    assert train.main(["--help-fields", "coder.selection"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert all(line.startswith("  --coder.selection.") for line in told)
    assert "  --coder.selection.bandwidth  (default: 0.5)" in told
    assert train.main(["--help-fields", "jumprelu"]) == 0
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert told == ["--coder.selection.threshold_start", "--coder.selection.bandwidth"]
    for asked in ("lr", "optim.lr", "--optim.lr", "optim"):
        assert train.main([f"--help-fields={asked}"]) == 0
        assert "--optim.lr  (default: None)" in capsys.readouterr().out
    assert train.main(["--help-fields", "jumprlu"]) == 2
    assert "no group, plug-in or field 'jumprlu'. Did you mean 'jumprelu'?" in capsys.readouterr().err
