"""sae-explain as users type it: one command from coder to results, the other commands, and bad input in one line."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rigs.fakes import tiny_model_folder, tiny_text_folder
from rigs.interp_runs import coder_folder
from rigs.runs import error_of
from safetensors.torch import save_file

import sae
from cli.explain import main
from sae.base.settings import read_yaml

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = ["--evidence.tokens", "30000", "--latents", "random:24", "--examples.test", "12", "--examples.shown", "10"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    model = tiny_model_folder(folder / "model", num_hidden_layers=2, initializer_range=0.5)
    text = tiny_text_folder(folder / "text")
    for name in ("one", "two"):
        coder_folder(folder / name, model, text)
    return folder


@pytest.fixture
def explain(made, tmp_path, capsys):
    """Returns sae-explain: arguments -> (exit code, all that it printed); a name stands for a coder's folder."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(made / a) if a in ("one", "two") else str(a) for a in arguments])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.mark.slow
def test_a_coder_in_another_format_is_explained_like_the_same_one_of_ours(made, explain, tmp_path):
    coder, folder = sae.load(made / "one"), tmp_path / "theirs"
    folder.mkdir()
    spec, tensors = coder.spec, {name: tensor.contiguous() for name, tensor in coder.state_dict().items()}
    where = {"model_name": spec.reads[0].model, "hook_name": "blocks.1.hook_resid_post", "sae_lens_version": "6.0.0"}
    config = {"architecture": "topk", "d_in": spec.d_in, "d_sae": spec.d_sae, "k": spec.selection.k, "metadata": where}
    (folder / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": True}))
    save_file(tensors | {"W_enc": tensors["W_enc"].T.contiguous()}, folder / "sae_weights.safetensors")
    text = [f"--text.{key}={value}" for key, value in spec.training["text"].items() if value]
    for name, path in (("ours", "one"), ("other", folder)):
        code, printed = explain(path, *SMALL, *text, "--run-dir", tmp_path / name)
        assert code == 0, printed
    ours, other = (pq.read_table(tmp_path / name / "results.parquet").to_pylist() for name in ("ours", "other"))
    assert [(row["latent"], row["explanation"]) for row in other] == [(r["latent"], r["explanation"]) for r in ours]
    code, printed = explain(folder, *SMALL, "--run-dir", tmp_path / "none")
    assert code == 2
    assert error_of(printed).startswith("text.source: the coder does not say what text it was trained on")


def test_from_a_coder_to_results(explain, tmp_path):
    code, printed = explain("one", *SMALL, "--run-dir", tmp_path / "run")
    assert code == 0
    assert "detection[rule]: balanced accuracy" in printed
    assert "embedding[tfidf]: auroc" in printed
    table = pq.read_table(tmp_path / "run" / "results.parquet").to_pylist()
    assert len({row["latent"] for row in table}) >= 10
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens"] == 30_000
    assert read_yaml(tmp_path / "run" / "config.yaml")["latents"] == "random:24"
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.jsonl")}
    code, _ = explain("one", *SMALL, "--run-dir", tmp_path / "run")
    assert code == 0
    after = {p: p.read_bytes() for p in before}
    assert after == before


@pytest.mark.slow
def test_a_number_is_the_latent_of_that_id_as_typed_and_in_a_config(explain, tmp_path):
    (tmp_path / "c.yaml").write_text("latents: 7\n")
    for name, typed in (("typed", ["--latents", "7"]), ("config", ["--config", tmp_path / "c.yaml"])):
        code, printed = explain("one", *SMALL[:2], "--explain-only", *typed, "--run-dir", tmp_path / name)
        assert code == 0, printed
        assert json.loads((tmp_path / name / "shards" / "1-of-1" / "latents.json").read_text()) == [7]
        assert read_yaml(tmp_path / name / "config.yaml")["latents"] == "7,"
    (tmp_path / "c.yaml").write_text("latents: '[3, 17]'\n")  # what a list in it is told to be
    (tmp_path / "ids.json").write_text("[3, 17]\n")
    for typed in (["--config", tmp_path / "c.yaml"], ["--latents", tmp_path / "ids.json"], ["--latents", "[3,17]"]):
        code, printed = explain("one", *SMALL[:2], "--explain-only", *typed, "--run-dir", tmp_path / "list")
        assert code == 0, printed
        assert json.loads((tmp_path / "list" / "shards" / "1-of-1" / "latents.json").read_text()) == [3, 17]
    older = tmp_path / "typed" / "config.yaml"  # as it was when a number said how many
    older.write_text(older.read_text().replace("latents: 7,", "latents: '5'"))
    code, printed = explain("--config", older, "--print-config")
    assert "latents: random:5" in printed
    code, printed = explain("--config", older)
    assert code == 0, printed
    asked = json.loads((tmp_path / "typed" / "shards" / "1-of-1" / "latents.json").read_text())
    assert len({*asked} - {7}) == 5  # beside what the command before was about


@pytest.mark.slow
def test_shards_are_merged_and_runs_compared(explain, tmp_path, made):
    for shard in ("1/2", "2/2"):
        assert explain("one", *SMALL, "--run-dir", tmp_path / "a", "--shard", shard)[0] == 0
    code, printed = explain("merge", tmp_path / "a")
    assert code == 0
    assert "detection[rule]" in printed
    assert explain("two", *SMALL, "--run-dir", tmp_path / "b")[0] == 0
    code, printed = explain(
        "compare", tmp_path / "a", tmp_path / "b", "--tokens", "2000", "--json", tmp_path / "c.json"
    )
    assert code == 0, printed
    found = json.loads((tmp_path / "c.json").read_text())
    for pair in found["matchings"]["decoder"]["pairs"]:  # both are the same coder
        assert pair["a"] == pair["b"]
        assert pair["strength"] == pytest.approx(1, abs=1e-5)
    assert found["mmcs"]["a_to_b"]["value"] == pytest.approx(1, abs=1e-5)
    assert found["mmcs"]["a_to_b"]["null"] < 0.9
    co = found["matchings"]["co-activation"]
    assert co["mean_strength"] == pytest.approx(1)
    assert co["similarity"]["value"]["value"] > co["similarity"]["null"]["value"]
    code, printed = explain("compare", tmp_path / "a", tmp_path / "b", f"--json={tmp_path / 'b'}")
    assert (code, f"--json: {tmp_path / 'b'} is a folder" in error_of(printed)) == (2, True)
    code, printed = explain(tmp_path / "b")
    assert (code, "is an explained run, it holds no coder" in error_of(printed)) == (2, True)


@pytest.mark.slow
def test_a_coder_that_took_the_place_of_an_explained_one_is_not_compared(explain, made, tmp_path):
    shutil.copytree(made / "one", tmp_path / "coder")
    for coder in (tmp_path / "coder", made / "two"):
        assert explain(coder, *SMALL, "--run-dir", tmp_path / f"of-{coder.name}")[0] == 0
    coder_folder(tmp_path / "other", made / "model", made / "text", seed=1)
    for path in (tmp_path / "other").iterdir():
        shutil.copy(path, tmp_path / "coder")
    code, printed = explain("compare", tmp_path / "of-two", tmp_path / "of-coder")
    assert code == 2
    assert "of-coder/evidence holds evidence made with another coder" in error_of(printed)


@pytest.mark.slow
def test_an_import_is_not_mixed_with_what_is_there(explain, tmp_path):
    assert explain("one", *SMALL, "--run-dir", tmp_path / "run")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, printed = explain("import", GOLDEN / "delphi" / "run", tmp_path / "run")
    assert (code, "holds a run; choose another folder" in error_of(printed)) == (2, True), printed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neurons", "topk_neurons", "random_direction", "random_init"])
def test_baselines_go_through_the_same_pipeline(explain, tmp_path, name):
    changed = ["--coder.baseline", name, "--examples.test", "10", "--null", "0", "--latents", "random:6"]
    code, printed = explain("one", *SMALL, *changed, "--run-dir", tmp_path / "run")
    assert code == 0, printed
    assert "token_lookup" in printed
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["baseline"] == name


def test_a_dry_run_prints_prompts_and_touches_nothing(explain, tmp_path):
    asked = ["--models.explainer.model", "gpt-x", "--price-in", "1", "--price-out", "2", "--run-dir", tmp_path / "run"]
    code, printed = explain("one", *SMALL, *asked, "--dry-run")
    assert code == 0
    assert not (tmp_path / "run").exists()
    assert "--- explainer llm" in printed
    assert "Description: (the explanation stands here)" in printed
    assert "<<" in printed
    assert "explainer: gpt-x, 24 requests" in printed
    assert " USD" in printed


def test_what_can_be_asked_without_a_coder(explain):
    code, printed = explain("--list-configs")
    assert code == 0
    assert "keyless" in printed
    code, printed = explain("--help-fields")
    assert code == 0
    assert "--models.judge.model" in printed
    assert "--scorers" in printed


@pytest.mark.slow
def test_evidence_is_gathered_before_there_is_anybody_to_ask(explain, tmp_path):
    """And does for labels that shards make."""
    asking = ["--models.explainer.model", "some", "--models.explainer.base_urls", "http://127.0.0.1:9/v1"]
    code, printed = explain("one", *SMALL, *asking, "--evidence-only", "--run-dir", tmp_path / "run")
    assert code == 0, printed
    assert not (tmp_path / "run" / "shards").exists()
    for shard in ("1/2", "2/2"):
        code, printed = explain("one", *SMALL, "--shard", shard, "--run-dir", tmp_path / "run")
        assert code == 0, printed
    assert explain("merge", tmp_path / "run")[0] == 0
    assert explain("one", *SMALL, "--run-dir", tmp_path / "whole")[0] == 0
    told = [pq.read_table(tmp_path / name / "results.parquet").to_pylist() for name in ("run", "whole")]
    assert [row["explanation"] for row in told[0]] == [row["explanation"] for row in told[1]]


def test_the_config_is_printed_and_read_back(explain, tmp_path):
    code, printed = explain("one", *SMALL, "--config", "openai", "--print-config")
    assert code == 0
    (tmp_path / "c.yaml").write_text(printed)
    code, again = explain("--config", tmp_path / "c.yaml", "--print-config")
    assert code == 0
    assert again == printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "coder.path: empty"),
        (["nowhere"], "coder.path: no such folder"),
        (["one", "--shard", "3/2"], "--shard: '3/2'"),
        (["one", "--shard", "half"], "--shard: 'half'"),
        (["one", "--explain-only", "--score-only"], "--score-only: does not go with --explain-only"),
        (["one", "--explain-only", "--evidence-only"], "--explain-only: does not go with --evidence-only"),
        (["one", "--scorers.x.type", "detectoin"], "Did you mean 'detection'?"),
        (["one", "--explainers.x.type", "llm"], "explainers.x: asks a language model; set models.explainer.model"),
        (["one", "--examples.shown-from", "bottom"], "examples.shown_from: 'bottom' is not one of"),
        (["one", "--examples.test", "3"], "examples.test: 3 is too small"),
        (["one", "--null", "some"], "null_latents"),
        (["one", "--budget-usd", "1", "--models.explainer.model", "gpt-x"], "budget_usd"),
        (["one", "--budget-usd", "-1"], "budget_usd: -1"),
        (["one", "--price-in", "1"], "price_in"),
        (["one", "--latents", "3,7,3"], "latents: 3 is there twice"),
        (["one", "--latents", "3,99"], "99 is out of range; the coder has latents 0 to 47"),
        (["one", "--latents", "-3"], "'-3' is no latent id"),
        (["one", "--latents", "random:0"], "latents: 'random:0' says no number of latents"),
        (["one", "--explanations", "no.jsonl"], "explanations: no such file: no.jsonl"),
        (["one", "--coder.baseline", "neuron"], "Did you mean 'neurons'"),
        (["one", "--models.judge.via", "carrier"], "models.judge.via: 'carrier'"),
        (["one", "--models.encoder.model", "/no/such/folder"], "encoder.model"),
        (["one", "--evidence.tokens", "30"], "text.source"),
        (["merge", "nowhere"], "path: no such folder: nowhere"),
        (["merge", "one"], "is no explained run, it holds no shards; run sae-explain"),
        (["compare", "one", "two"], "is no explained run"),
        (["import", "one", "x"], "holds no scores"),
        (["--config", "keyles"], "Did you mean 'keyless'"),
        (["one", "--null_latents"], "its value is missing"),
    ],
)
def test_bad_input_is_one_line(explain, tmp_path, arguments, said):
    small = [] if arguments[:1] in (["merge"], ["compare"], ["import"]) else ["--run-dir", tmp_path / "run"]
    if small and "--evidence.tokens" not in arguments:
        small += ["--evidence.tokens", "30000"]
    code, printed = explain(*arguments[:1], *small, *arguments[1:]) if arguments[:1] == ["one"] else explain(*arguments)
    assert code == (1 if arguments[:1] == ["import"] else 2), printed
    assert said in error_of(printed)


SERVER = ["--models.explainer.model", "x", "--models.explainer.base_urls"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*SERVER, "[http://127.0.0.1:9/v1]"], "explainer"),
        ([*SERVER, "[http://192.0.2.1/v1]"], "OPENAI_API_KEY"),
        (["--budget-usd", "1", *SERVER, "[http://192.0.2.1/v1]"], "budget_usd"),
        (["--models.encoder.model", "/no/such/folder"], "encoder.model: no such folder"),
        (["--latents", "48"], "latents: 48 is out of range; the coder has latents 0 to 47"),
        (["--explanations", "LINES"], "LINES:1: not a line of JSON"),
        (["--scorers.i.type", "intruder"], "scorers.i: asks a judge"),
        (["--score-only"], "only: score, but TMP/run holds no explanation; leave out --score-only"),
    ],
)
def test_what_must_fail_fails_before_the_long_work(explain, tmp_path, monkeypatch, arguments, said):
    def begun(*_args):
        raise AssertionError("the passes began")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("interp.run.explaining.read_from", begun)
    monkeypatch.setattr("interp.client.remote.limiter.FIRST_PAUSE_S", 0.001)
    (tmp_path / "LINES").write_text("{")
    code, printed = explain("one", *SMALL[:2], "--run-dir", tmp_path / "run", *arguments)
    assert code == 2, printed
    assert said.replace("TMP", str(tmp_path)) in error_of(printed)


def test_failed_latents_end_in_code_3_with_their_reasons_and_have_rows(explain, tmp_path):
    from rigs.fake_llm import FakeLLM

    with FakeLLM(lambda asked: "hel\x1b[31mlo", logprobs=0, schemas=()) as server:
        model = ["--models.explainer.model", "fake", "--models.explainer.base_urls", f"[{server.url}]"]
        options = [*SMALL, *model, "--models.explainer.max_tries", "1", "--explain-only", "--run-dir", tmp_path / "run"]
        code, printed = explain("one", *options, "--latents", "5,7,9")
    assert code == 3, printed  # that is no explanation in JSON
    assert "\x1b" not in printed
    assert re.fullmatch(r"3 of 3 latents failed: 3 parse \(.+\); --retry-failed does them again", error_of(printed))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["explanations"]["llm"] == {"failed": 3}
    failure = summary["failures"]["llm"]["parse"]
    assert failure["latents"] == 3
    assert failure["first"]
    assert f"no explanation: 3 parse ({failure['first']})" in printed
    rows = pq.read_table(tmp_path / "run" / "results.parquet").to_pylist()
    told = [row for row in rows if row["explainer"] == "llm"]
    assert [(row["latent"], row["status"], row["scorer"], row["explanation"]) for row in told] == [
        (latent, "failed", None, None) for latent in (5, 7, 9)
    ]
    assert all(row["reason"] == f"1 parse ({failure['first']})" for row in told)
    for latent in (5, 7, 9):
        assert f"  latent {latent:<8}    -  failed: 1 parse ({failure['first']})" in printed.splitlines()


@pytest.mark.parametrize("after", [True, False])
def test_the_value_of_a_field_is_not_taken_for_the_path(explain, made, after):
    fields = ["--models.explainer.model", "fake", "--null-latents", "-1", "--latents", "3"]
    code, printed = explain(*(["one", *fields] if after else [*fields, "one"]), "--print-config")
    assert code == 0, printed
    assert f"path: {made / 'one'}" in printed
    assert "model: fake" in printed
    code, printed = explain(*fields, "--print-config")
    assert code == 2
    assert error_of(printed).startswith("coder.path: empty")
