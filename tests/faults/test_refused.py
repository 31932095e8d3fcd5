"""A command that is refused leaves everything as it was, and the corrected one runs as though it had not been typed."""

import json
from pathlib import Path

import pytest
import torch
from rigs.fake_llm import FakeLLM
from rigs.fakes import tiny_model_folder, tiny_text_folder
from rigs.interp_runs import coder_folder, scripted
from rigs.runs import error_of

import sae
from cli.evaluate import main as sae_eval
from cli.explain import main as sae_explain
from cli.load import main as sae_load

SMALL = ["--evidence.tokens", "30000", "--latents", "random:24", "--examples.test", "12", "--examples.shown", "10"]
SERVER = ["--models.explainer.model", "fake", "--models.explainer.base_urls"]
REFUSED = {
    "no key": (["--models.explainer.model", "gpt-4o-mini"], "OPENAI_API_KEY"),
    "nobody there": ([*SERVER, "[http://127.0.0.1:9/v1]"], "explainer"),
    "no such encoder": (["--models.encoder.model", "./no/such/folder"], "encoder.model: no such folder"),
    "no such model": (["--model.name", "./nowhere"], "model.name: no such folder: ./nowhere"),
    "no such text": (["--text.source", "./nowhere"], "text.source: no such file or folder"),
    "too little text": (["--evidence.tokens", "30"], "text.source"),
    "no such latent": (["--latents", "48"], "latents: 48 is out of range; the coder has latents 0 to 47"),
    "no such coder": (["--coder.name", "layers.7"], "coder.name: no 'layers.7'"),
}


def tree(folder: Path) -> dict[str, bytes | None] | None:
    """Returns what lies below a folder: the bytes of files, None for folders; None if it is not there."""
    if not folder.exists():
        return None
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    model = tiny_model_folder(folder / "model", num_hidden_layers=2, initializer_range=0.5)
    coder_folder(folder / "one", model, tiny_text_folder(folder / "text"))
    silent = sae.load(folder / "one")
    with torch.no_grad():
        silent.W_enc.zero_()
    sae.save(silent, folder / "silent")
    return folder


@pytest.fixture
def typed(made, tmp_path, monkeypatch, capsys):
    """Returns a command as typed: (main, arguments) -> (exit code, all that it printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("interp.client.remote.limiter.FIRST_PAUSE_S", 0.001)

    def run(main, *arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.mark.slow
def test_explain_writes_nothing_before_all_can_be(typed, made, tmp_path):
    run = tmp_path / "deep" / "run"
    for options, said in REFUSED.values():
        code, printed = typed(sae_explain, made / "one", *SMALL, *options, "--run-dir", run)
        assert code == 2, printed
        assert said in error_of(printed)
        assert tree(tmp_path / "deep") is None, said
    code, printed = typed(sae_explain, made / "silent", *SMALL, "--run-dir", run)
    assert code == 2, printed
    assert "latents: none of 48 fires" in error_of(printed)
    assert tree(run) is None
    with FakeLLM(scripted, logprobs=0) as server:
        code, printed = typed(sae_explain, made / "one", *SMALL, *SERVER, f"[{server.url}]", "--run-dir", run)
        assert code == 0, printed
    whole = tree(run)
    for options, _ in REFUSED.values():
        code, printed = typed(sae_explain, made / "one", *SMALL, *options, "--run-dir", run)
        assert code == 2, printed
        now = tree(run)
        assert now is not None
        assert whole is not None
        assert now.keys() == whole.keys()
        answers = "shards/1-of-1/cache.sqlite"  # which counts what calls came to
        assert [name for name in now if now[name] != whole[name] and name != answers] == [], options


@pytest.mark.slow
def test_settings_of_a_refused_command_of_an_older_version_lock_nothing(typed, made, tmp_path):
    run = tmp_path / "run"
    assert typed(sae_explain, made / "one", *SMALL, "--run-dir", run)[0] == 0
    config = (run / "config.yaml").read_text()
    assert "model: ''" in config
    locked = config.replace("explainer:\n    model: ''", "explainer:\n    model: gpt-4o-mini", 1)
    locked = locked.replace("judge:\n    model: ''", "judge:\n    model: gpt-4o-mini", 1).replace(
        "seed: 0", "seed: 7", 1
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text(locked.replace(str(run), str(bare)))
    (run / "config.yaml").write_text(locked.replace("seed: 7", "seed: 0"))
    with FakeLLM(scripted, logprobs=0) as server:
        for folder in (bare, run):  # one with settings alone; one with rows that no LLM has a part in
            options = [*SMALL, *SERVER, f"[{server.url}]", "--run-dir", folder]
            code, printed = typed(sae_explain, made / "one", *options)
            assert code == 0, printed
            told = json.loads((folder / "summary.json").read_text())
            assert {one["explainer"] for one in told["scores"]} >= {"llm", "token_lookup"}
        other = ["--models.explainer.model", "other", *SERVER[2:], f"[{server.url}]"]
        code, printed = typed(sae_explain, made / "one", *SMALL, *other, "--run-dir", run)
        assert code == 2  # now there are rows by the first
        assert error_of(printed).startswith("models.explainer.model: 'other', but ")
        assert error_of(printed).endswith("leave that as it was, or choose another folder with --run-dir")


@pytest.mark.slow
def test_the_other_commands_on_explained_runs(typed, made, tmp_path):
    for name in ("a", "b"):
        assert typed(sae_explain, made / "one", *SMALL, "--run-dir", tmp_path / name)[0] == 0
    before = tree(tmp_path)
    for arguments, said in (
        (["compare", "a", "b", "--encoder", "x", "--encoder-url", "http://127.0.0.1:9/v1"], "encoder"),
        (["compare", "a", "b", "--encoder", "./no/such"], "encoder.model: no such folder"),
        (["compare", "a", "b", "--explainer", "lmm"], "--explainer: "),
        (["compare", "a", "c"], "path: no such folder: c"),
        (["merge", "c"], "path: no such folder: c"),
        (["import", "a", "new/run"], "holds no scores"),
    ):
        code, printed = typed(sae_explain, *arguments)
        assert code in (1, 2), printed
        assert said in error_of(printed)
        assert tree(tmp_path) == before, arguments
    assert typed(sae_explain, "compare", "a", "b", "--tokens", "2000")[0] == 0


def test_load_and_eval(typed, made, tmp_path):
    for main, arguments, said in (
        (sae_load, ["convert", made / "one", "--to", "saelnes", "new/deep/out"], "format: 'saelnes' is not one of"),
        (sae_load, ["convert", made / "none", "--to", "saelens", "new/deep/out"], "path: no such folder"),
        (sae_load, ["convert", made / "one", "--to", "gemma_scope", "new/deep/out"], "format: "),
        (sae_load, ["fetch", "./none", "--to", "new/out"], "path: no such folder"),
        (sae_load, ["push", made / "one", "no-owner"], "repo: 'no-owner' is not OWNER/NAME"),
        (sae_eval, [made / "none", "--json", "new/deep/e.json"], "path: no such folder"),
        (sae_eval, [made / "one", "--model.name", "./no", "--json", "new/deep/e.json"], "model.name: no such folder"),
        (sae_eval, [made / "one", "--text.source", "./no", "--json", "new/deep/e.json"], "text.source: no such"),
    ):
        code, printed = typed(main, *arguments)
        assert code == 2, printed
        assert said in error_of(printed)
        assert tree(tmp_path / "new") is None, arguments
    assert typed(sae_load, "convert", made / "one", "--to", "saelens", "new/deep/out")[0] == 0
    assert typed(sae_eval, made / "one", "--tokens", "256", "--json", "new/other/e.json")[0] == 0


def test_train(tiny_train, tmp_path):
    run = tmp_path / "new" / "run"
    (tmp_path / "blank.txt").write_text("\n\n")
    for changes, said in (
        ({"model.name": "./nowhere"}, "model.name: no such folder"),
        ({"text.source": "./nowhere"}, "text.source: no such file"),
        ({"text.source": str(tmp_path / "blank.txt")}, "text.source: "),
        ({"activations.sites": ["layers.7"]}, "activations.sites: "),
        ({"coder.start_from": "./nowhere"}, "coder.start_from: no such folder: ./nowhere"),
        ({"log.tracker": "none", "batch_tokens": 100}, "batch_tokens: 100"),
    ):
        code, printed = tiny_train(changes, folder=run)
        assert code == 2, printed
        assert said in error_of(printed)
        assert tree(tmp_path / "new") is None, changes
    code, printed = tiny_train(folder=run)
    assert code == 0, printed
