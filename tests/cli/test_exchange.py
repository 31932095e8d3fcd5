"""sae-view --export as users type it: what is written, what is said of it, and bad input in one line."""

import gzip
import json

import pytest
from rigs.fakes import tiny_model_folder, tiny_text_folder
from rigs.interp_runs import coder_folder
from rigs.runs import error_of

from cli.explain import main as sae_explain
from cli.view import main
from interp.exchange.neuronpedia_schema import check_tree
from interp.view.notes import Notes

SMALL = ["--evidence.tokens", "30000", "--examples.test", "12", "--examples.shown", "10"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an explained run of three latents, by two commands."""
    folder = tmp_path_factory.mktemp("exported")
    model = tiny_model_folder(folder / "model", num_hidden_layers=2, initializer_range=0.5)
    coder_folder(folder / "one", model, tiny_text_folder(folder / "text"))
    for latents in ("3,17", "20"):
        assert sae_explain([str(folder / "one"), *SMALL, "--latents", latents, "--run-dir", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def view(made, monkeypatch, capsys):
    """Returns sae-view as typed there: arguments -> (exit code, all that it printed)."""
    monkeypatch.chdir(made)

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_neuronpedia_gets_all_latents_of_all_commands_under_names_that_are_told(view, made, tmp_path):
    code, printed = view("run", "--export", "neuronpedia")
    assert code == 0, printed
    assert "source       model/1-res-topk-48; --model-id and --source-id name it otherwise" in printed
    assert check_tree(made / "run" / "neuronpedia", "model", "1-res-topk-48")["Neuron"] == 3
    Notes(made / "run").change(3, label="the letter f, by hand")
    names = ("--model-id", "tiny", "--source-id", "1-res")
    code, printed = view("run", "--export", "neuronpedia", tmp_path / "new" / "lines", *names, "--json")
    assert code == 0, printed
    told = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
    assert (told["model_id"], told["source_id"], told["latents"]) == ("tiny", "1-res", 3)
    for kind, counted in (("features", "latents"), ("activations", "activations")):
        path = tmp_path / "new" / "lines" / "tiny" / "1-res" / kind / "batch-0.jsonl.gz"
        lines = gzip.decompress(path.read_bytes()).splitlines()
        assert len(lines) == told[counted]
        assert {json.loads(line)["index"] for line in lines} == {"3", "17", "20"}, kind

    packed = (tmp_path / "new" / "lines" / "tiny" / "1-res" / "explanations" / "batch-0.jsonl.gz").read_bytes()
    people = [row for row in map(json.loads, gzip.decompress(packed).splitlines()) if row["typeName"] == "human"]
    assert [(row["index"], row["description"]) for row in people] == [("3", "the letter f, by hand")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--export", "neuronpedai"], "--export: 'neuronpedai' is not one of neuronpedia, static. Did you mean"),
        (["run", "--export", "neuronpedia", "a", "b"], "--export: 2 folders; it takes one"),
        (["run", "--export", "static"], "--export: static needs a folder"),
        (["run", "--export", "neuronpedia", "x", "--model-id", "google/gemma"], "--model-id: 'google/gemma' is no id"),
        (["run", "--export", "neuronpedia", "x", "--model-id", ".."], "--model-id: '..' is no id"),
        (
            ["run", "--export", "neuronpedia", "x", "--source-id", "res"],
            "--source-id: 'res' is no id",
        ),
        (["run", "--model-id", "gpt2"], "--model-id: it goes with --export neuronpedia"),
        (["run", "--export", "static", "x", "--source-id", "6-a"], "--source-id: it goes with --export neuronpedia"),
        (["run", "one", "--export", "static", "x"], "RUN: 2 runs; --prompt, --serve and --export take one"),
        (["one", "--export", "neuronpedia", "x"], "is no explained run, it holds no shards; run sae-explain"),
        (["none", "--export", "neuronpedia", "x"], "RUN: no such folder: none. Did you mean 'one'?"),
        (["run", "--export", "neuronpedia", "run/config.yaml/x"], "--export: cannot write to"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(view, made, arguments, said):
    before = sorted(made.rglob("*"))
    code, printed = view(*arguments)
    assert code == 2, printed
    assert said in error_of(printed)
    assert sorted(made.rglob("*")) == before


def test_a_site_has_the_reports_of_a_run_and_an_index(view, made, tmp_path):
    code, printed = view("run", "--export", "static", tmp_path / "site", "--json")
    assert code == 0, printed
    assert {path.name for path in (tmp_path / "site").iterdir()} == {
        "index.html", "report.html", ".nojekyll", ".site.json",
    }  # fmt: skip
    assert (tmp_path / "site" / "report.html").read_bytes() == (made / "run" / "report.html").read_bytes()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "index.html").write_text("mine")
    code, printed = view("run", "--export", "static", tmp_path / "full")
    assert code == 2
    assert "--export: " in error_of(printed)
    assert (tmp_path / "full" / "index.html").read_text() == "mine"
