"""The folder of a run: what it holds fixed, by whatever names it is given, and what older versions wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rigs.fakes import tiny_model_folder, tiny_text_folder
from rigs.interp_runs import coder_folder
from rigs.runs import error_of

import sae
from cli.explain import main
from cli.view import main as sae_view
from interp.run.rundir import coder_digest, run_folder, saved_config
from sae.base.errors import ConfigError
from sae.base.settings import read_yaml
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.selection.topk import TopK

SMALL = ["--evidence.tokens", "30000", "--latents", "random:12", "--examples.test", "12", "--examples.shown", "10"]


@pytest.mark.parametrize(
    ("stood", "means"),
    [("'100'", "random:100"), ("100", "random:100"), ("23,55", "23,55"), ("508,", "508,"), ("all", "all")],
)
def test_a_bare_number_in_the_config_of_an_older_run_is_so_many_at_random(tmp_path, stood, means):
    (tmp_path / "config.yaml").write_text(f"latents: {stood}\n")
    assert saved_config(tmp_path).latents == means


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A coder below runs/, explained, with its model and its text beside it; paths as they are typed from there."""
    folder = tmp_path_factory.mktemp("rundir")
    model = tiny_model_folder(folder / "model", num_hidden_layers=2, initializer_range=0.5)
    text = tiny_text_folder(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        coder_folder(Path("runs/q"), model.relative_to(folder), text.relative_to(folder))
        assert main(["runs/q", *SMALL]) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of that, from which commands are typed."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "here" / "cache"))
    (tmp_path / "here" / "link").symlink_to("runs/q")
    return tmp_path / "here"


def typed(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def journals(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shards/*/journal-*.jsonl")}


@pytest.mark.slow
def test_one_coder_by_any_name_is_one(here, capsys):
    explain, before = here / "runs" / "q" / "explain", journals(here / "runs" / "q" / "explain")
    windows = sorted((explain / "evidence" / "windows").iterdir())
    for name in ("runs/q/", "./runs/q", here / "runs" / "q", "link", "~/runs/q", "runs/../runs/q"):
        code, printed = typed(capsys, name, *SMALL)
        assert code == 0, printed
    for options in (
        ["--model.name", "model/"],
        ["--model.name", here / "model", "--text.source", here / "text"],
        ["--text.source", "./text/"],
        ["--run-dir", "link/explain/"],
    ):
        code, printed = typed(capsys, "runs/q", *SMALL, *options)
        assert code == 0, printed
    assert journals(explain) == before
    assert sorted((explain / "evidence" / "windows").iterdir()) == windows


def test_a_run_elsewhere_is_gone_on_with_from_anywhere(here, capsys, tmp_path, monkeypatch):
    """Whatever of its coder, model and text was typed from here."""
    run, names = tmp_path / "labels", ["--model.name=model", "--text.source", "text"]
    code, printed = typed(capsys, "runs/q", *SMALL, "--explain-only", *names, "--run-dir", run)
    assert code == 0, printed
    monkeypatch.chdir(tmp_path)
    code, printed = typed(capsys, "--config", run / "config.yaml", "--latents=5")
    assert code == 0, printed
    told = read_yaml(run / "config.yaml")
    assert [told["coder"]["path"], told["model"]["name"], told["text"]["source"]] == [
        str(here / name) for name in ("runs/q", "model", "text")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True])
def test_a_moved_run_goes_on_is_merged_compared_and_exported(here, capsys, older):
    explain = here / "runs" / "q" / "explain"
    if older:  # as it was before weights had a digest, and text a name of its own
        for name, key in (("env", "coder"), ("evidence/evidence", "text"), ("evidence/latents/header", "text")):
            path = explain / f"{name}.json"
            found = json.loads(path.read_text())
            del found.get("fingerprint", found)[key]
            path.write_text(json.dumps(found))
        for path in explain.glob("evidence/latents/shards-*.jsonl"):  # nor did lines say of what store they are
            lines = [{k: v for k, v in json.loads(x).items() if k != "store"} for x in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = journals(explain)
    shutil.copytree("runs/q", "runs/twin")
    Path("elsewhere").mkdir()
    moved = Path("runs/q").rename("elsewhere/moved")
    code, printed = typed(capsys, moved, *SMALL)
    assert code == 0, printed
    assert journals(moved / "explain") == before
    for arguments in (
        ["merge", "elsewhere/moved/"],
        ["compare", "elsewhere/moved", "./runs/twin/", "--tokens", "2000"],
    ):
        code, printed = typed(capsys, *arguments)
        assert code == 0, printed
    assert sae_view(["elsewhere/moved", "--export", "neuronpedia", "out", "--source-id", "1-res"]) == 0
    assert json.loads((moved / "explain" / "compare-twin.json").read_text())["mmcs"]["a_to_b"]["value"] > 0.999
    assert not Path("runs/q").exists()


def test_the_same_model_and_text_elsewhere_are_the_same(here, capsys):
    before = journals(here / "runs" / "q" / "explain")
    Path("models").mkdir()
    shutil.move("model", "models/new")
    shutil.move("text", "texts")
    options = ["--model.name", "models/new", "--text.source", "texts", "--text.context_length", "64"]
    code, printed = typed(capsys, "runs/q", *SMALL, *options)
    assert code == 0, printed
    assert journals(here / "runs" / "q" / "explain") == before
    (here / "texts" / "more.txt").write_text("quite another text " * 500)
    code, printed = typed(capsys, "runs/q", *SMALL, *options)
    assert code == 2, printed
    assert "text" in error_of(printed)
    assert journals(here / "runs" / "q" / "explain") == before


@pytest.mark.slow
def test_shards_of_other_machines_and_folders_are_one_run(here, capsys, monkeypatch):
    options = [*SMALL, "--run-dir", here / "shared"]
    assert typed(capsys, "runs/q", *options, "--shard", "1/2")[0] == 0
    shutil.copytree("runs/q", "copied/q", ignore=shutil.ignore_patterns("explain"))
    code, printed = typed(capsys, "copied/q", *options, "--shard", "2/2")
    assert code == 0, printed
    monkeypatch.chdir(here / "copied")
    assert typed(capsys, "merge", "../shared")[0] == 0


def test_other_weights_under_the_same_name_are_another_coder(here, capsys):
    coder = sae.load("runs/q")
    with torch.no_grad():
        coder.W_enc[7, 5] += 1e-3  # no value that the evidence's own sample looks at
    sae.save(coder, "runs/q")
    before = journals(here / "runs" / "q" / "explain")
    code, printed = typed(capsys, "runs/q", *SMALL)
    assert code == 2, printed
    assert error_of(printed).startswith("coder.path: runs/q has other weights than the coder that runs/q/explain is of")
    assert journals(here / "runs" / "q" / "explain") == before


def test_a_digest_is_of_what_a_coder_computes():
    coder = SparseCoder(CoderSpec(d_in=4, d_out=4, d_sae=8, selection=TopK(k=2)))
    digest = coder_digest(coder)
    a, b = ((Site("layers.1", model=model),) for model in "ab")
    coder.spec = coder.spec.with_(reads=a, writes=a)
    sited = coder_digest(coder)
    assert sited != digest
    coder.spec = coder.spec.with_(reads=b, writes=b, metrics={"x": 1})
    assert coder_digest(coder) == sited


def test_the_folder_of_a_run_is_found_from_its_coder(here):
    explain = here / "runs" / "q" / "explain"
    assert run_folder(here / "runs" / "q") == run_folder(explain) == explain
    inside = here / "runs" / "q" / "coders" / "model.layers.1"
    inside.mkdir(parents=True)
    assert run_folder(inside) == explain
    with pytest.raises(ConfigError, match=r"path: no such folder: .*rnus/q\. Did you mean '.*runs/q'"):
        run_folder(here / "rnus" / "q")
