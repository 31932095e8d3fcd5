"""interp in a notebook: explained runs and examples as objects, from whatever a folder can be called by."""

import asyncio
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rigs.pages import blocks, latents_of_blocks
from rigs.runs import files

import interp
import sae
from interp.run.explaining import Outcome
from interp.scorers.detection import Detection
from sae.base.errors import ConfigError, Stopped
from sae.base.files import read_json

SMALL = {"evidence": {"tokens": 30_000}, "examples.test": 12, "examples": {"shown": 10}}
TABLES = ("results.parquet", "measures.parquet")
HOSTILE = "<script>alert(1)</script><img src=x onerror=y>"


@pytest.fixture(scope="module")
def run(explained_coder):
    return interp.results(explained_coder)


def test_a_run_is_what_its_folder_holds(explained_coder, run):
    folder = explained_coder / "explain"
    for named in (folder, str(folder), explained_coder, SimpleNamespace(run_dir=explained_coder), run):
        assert interp.results(named).run_dir == folder
    assert run.summary == read_json(folder / "summary.json")
    assert run.table() == pq.read_table(folder / "results.parquet")
    assert run.to_pandas().equals(pq.read_table(folder / "results.parquet").to_pandas())
    assert len(run) == 12
    assert run.latents == [record.latent for record in run] == list(range(12))
    assert 3 in run
    assert np.int64(3) in run
    assert 20 not in run


def test_a_latent_has_its_label_and_scores(run):
    row = next(row for row in run.table().to_pylist() if row["status"] == "ok")
    for key in (row["latent"], np.int64(row["latent"]), str(row["latent"])):
        found = run[key]
        assert (found.latent, found.status) == (row["latent"], "ok")
        assert found.label.text == row["explanation"]
        (score,) = [score for score in found.label.scores if score.scorer == row["scorer"]]
        measured = (score.value, score.measure.low, score.measure.high, score.n)
        assert measured == (row["score"], row["score_low"], row["score_high"], row["n"])
        assert score.measures[row["headline"]] == score.measure
    assert repr(found).startswith(f"latent {found.latent} of 0 to 47: token_lookup: fires on the tokens ")
    assert f"{score.scorer} {score.value:.2f}" in repr(found)
    assert "\n" not in repr(found)
    assert "strongest windows" in str(found)


def test_several_are_a_list(run):
    assert [found.latent for found in run[[7, 3]]] == [3, 7]
    assert [found.latent for found in run[np.array([3])]] == [3]
    assert [found.latent for found in run[:3]] == [0, 1, 2]
    assert [found.latent for found in run[10:]] == [10, 11]


def test_a_run_shows_itself_as_the_command_tells_of_it(run, explained_coder):
    head, *lines = repr(run).splitlines()
    assert head == f"{explained_coder / 'explain'}: 12 latents"
    assert "token_lookup: " in lines[1]
    assert any(line.startswith("  detection[rule]: balanced accuracy ") for line in lines)
    assert run._repr_html_().count("<tr>") == 13
    again = type(run)(run.run_dir, asked=[3], unfinished="the budget is spent")
    assert repr(again).splitlines()[1] == "unfinished: the budget is spent"
    assert [line.split()[1] for line in repr(again).splitlines() if line.startswith("  latent ")] == ["3"]


def test_examples_have_tokens_and_activations(run, explained_coder):
    found = interp.examples(explained_coder, 3)
    assert len(found) == 28
    assert all(0 <= example.decile <= 9 and example.split in ("explain", "valid", "test") for example in found)
    assert len(found.top(5)) == 5
    strengths = [abs(example.activation) for example in found]
    assert strengths == sorted(strengths, reverse=True)
    example = found[0]
    assert example.kind == "strongest"
    assert "".join(example.tokens) == example.text
    assert len(example.tokens) == len(example.activations) == len(example.token_ids)
    token, activation = example.top(1)[0]
    assert activation == example.activation
    assert f"\u00ab{token}" in repr(example)
    assert repr(found.top(2)).splitlines() == ["latent 3, 2 examples", repr(found[0]), repr(found[1])]
    assert found.table().column_names[:3] == ["latent", "kind", "activation"]
    assert found.to_pandas()["activation"].tolist() == [one.activation for one in found]
    assert interp.examples(run, "3")[0] == example


def test_what_is_masked_in_training_fires_in_no_example(run):
    examples = [example for record in run for example in record.examples]
    pairs = [pair for one in examples for pair in zip(one.token_ids, one.activations, strict=True)]
    fires = {token for token, value in pairs if value}
    assert len(fires) > 5
    assert not fires & {0, 1, 2}  # the coder's mask


@pytest.mark.parametrize(
    ("key", "error", "said"),
    [
        (20, ConfigError, r"latents: 20 is not explained in .*; interp.explain\('.*', latents=20\) explains it$"),
        ([3, 20], ConfigError, "latents: 20 is not explained"),
        (48, ConfigError, "latents: 48 is out of range; the coder has latents 0 to 47"),
        ("x", ConfigError, "latents: 'x' is no latent id"),
        ("alive", ConfigError, "latents: 'alive' names no latent"),
        (3.0, TypeError, "latents: 3.0 is no latent id"),
    ],
)
def test_latents_that_are_not_there(run, key, error, said):
    with pytest.raises(error, match=said):
        run[key]


def test_one_latent_at_a_time(run):
    for several in ([3, 4], "3,4", slice(3), "alive"):
        with pytest.raises(TypeError, match="is not the id of one latent"):
            interp.examples(run, several)
    with pytest.raises(ConfigError, match="latents: 20 is not explained"):
        interp.examples(run, 20)


def test_what_is_no_run(tmp_path, explained_coder):
    for none in (None, 3, [explained_coder], np.zeros(3), {"run_dir": "x"}):
        with pytest.raises(TypeError, match="was given; it takes the folder of a run, or what sae"):
            interp.results(none)
    with pytest.raises(ConfigError, match="no such folder"):
        interp.results(tmp_path / "none")
    with pytest.raises(ConfigError, match="is no explained run"):
        interp.examples(explained_coder.parent / "model", 3)


@pytest.fixture
def never_loaded(monkeypatch):
    """Makes loading a model an error, for what must be known before."""

    def loaded(*_args, **_kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("interp.run.preparing.load_language_model", loaded)


def same(run_dir, explained_coder):
    return all((run_dir / name).read_bytes() == (explained_coder / "explain" / name).read_bytes() for name in TABLES)


def test_the_call_gives_what_the_command_gives_also_where_a_loop_runs(explained_coder, tmp_path):
    told = []

    async def cell():
        return interp.explain(explained_coder, range(12), config=SMALL, run_dir=tmp_path / "run", progress=told.append)

    found = asyncio.run(cell())
    assert same(found.run_dir, explained_coder)
    assert {"evidence", "windows", "explaining", "scoring"} <= {at.what for at in told}
    assert (found.run_dir, found.asked, found.unfinished) == (tmp_path / "run", list(range(12)), "")
    assert found.summary == read_json(tmp_path / "run" / "summary.json")
    assert latents_of_blocks(blocks(tmp_path / "run" / "report.html")).keys() == set(range(12))
    again = interp.explain(tmp_path / "run", 3, progress=False)  # goes on with the settings of the folder
    assert again.asked == [3]
    assert len(again) == 12
    assert same(again.run_dir, explained_coder)


def test_a_loaded_coder_and_a_loaded_model_are_those_of_the_folder(explained_coder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    coder, held = sae.load(explained_coder), AutoModelForCausalLM.from_pretrained(explained_coder.parent / "model")
    coder.requires_grad_(True).train()
    before = {name: tensor.clone() for name, tensor in coder.state_dict().items()}
    found = interp.explain(coder, "0-11", model=held, config=SMALL, progress=False)
    assert same(found.run_dir, explained_coder)
    assert found.run_dir.parent.parent == type(found.run_dir)("runs")
    assert coder.training
    assert all(parameter.requires_grad for parameter in coder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in coder.state_dict().items())
    assert interp.explain(found, 20, progress=False).latents == [*range(12), 20]  # of the coder that the folder keeps
    other = sae.load(explained_coder)
    with torch.no_grad():
        other.W_enc[0] *= 2
    with pytest.raises(ConfigError, match="has other weights than the coder that"):
        interp.explain(other, 3, config=SMALL, run_dir=found.run_dir, progress=False)


def test_ctrl_c_ends_it_with_what_is_finished_and_the_same_call_goes_on(explained_coder, tmp_path):
    def interrupt(at):
        if at.what == "scoring" and not at.done:
            os.kill(os.getpid(), signal.SIGINT)

    def call(progress):
        return interp.explain(explained_coder, range(12), config=SMALL, run_dir=tmp_path / "run", progress=progress)

    async def cell():
        with pytest.raises(Stopped, match="while scoring"):
            call(interrupt)

    asyncio.run(cell())
    unfinished = interp.results(tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert len(unfinished) == 12
    assert unfinished[0].label.text is not None
    assert same(call(False).run_dir, explained_coder)


@pytest.mark.parametrize(
    ("cut_off", "failed", "said"),
    [
        ("the budget is spent", "", "the budget is spent; the same call goes on with what is missing"),
        ("it goes on later", "3 of 9 latents failed", "it goes on later"),
        ("", "3 of 9 latents failed", "3 of 9 latents failed; retry_failed=True does them again"),
        ("", "", ""),
    ],
)
def test_what_is_unfinished_is_returned_and_says_why(explained_coder, monkeypatch, cut_off, failed, said):
    outcome = Outcome(explained_coder / "explain", [3], {}, cut_off, failed)
    monkeypatch.setattr("interp.view.notebook.explain_run", lambda *_, **__: outcome)
    found = interp.explain(explained_coder, 3)
    assert found.unfinished == said
    assert (f"unfinished: {said}" in repr(found)) == bool(said)


def test_text_of_strangers_stays_text_in_a_notebook(explained_coder, tmp_path):
    (tmp_path / "theirs.jsonl").write_text(json.dumps({"latent": 3, "text": HOSTILE}))
    found = interp.explain(
        explained_coder,
        3,
        config=SMALL,
        explanations=tmp_path / "theirs.jsonl",
        scorers=["embedding"],
        run_dir=tmp_path / "run",
        progress=False,
    )
    assert found[3].label.text == HOSTILE
    for shown in (found._repr_html_(), found[3]._repr_html_(), found[3].examples._repr_html_()):
        assert "<script" not in shown
        assert "<img" not in shown
    assert "&lt;script&gt;alert(1)" in found._repr_html_()
    assert "&lt;script&gt;alert(1)" in found[3]._repr_html_()


@pytest.mark.parametrize(
    "options",
    [
        {"scorers": "detection", "explainers": ["token_lookup"]},
        {"scorers": {"detection": Detection()}, "explainers": {"token_lookup": "token_lookup"}},
        {"scorers": [Detection()], "config": "keyless"},
        {"scorers.detection.type": "detection", "seed": np.int64(0)},
    ],
)
def test_sections_may_be_names_and_objects(explained_coder, monkeypatch, options):
    seen = []
    monkeypatch.setattr("interp.view.notebook.explain_run", lambda config, **_: seen.append(config))
    interp.explain(explained_coder, 3, **options)
    assert Detection() in seen[0].scorers.values()
    assert list(seen[0].explainers) == ["token_lookup"]
    assert seen[0].latents == "3,"


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"run": None}, TypeError, "run: None was given; it takes the folder of a run or of a coder, a hub id, a Sp"),
        ({"run": np.zeros(3)}, TypeError, r"run: numpy.ndarray of shape \[3\] was given"),
        ({"run": "codr"}, ConfigError, "coder.path: "),
        ({"latents": 48}, ConfigError, "latents: 48 is out of range; the coder has latents 0 to 47"),
        ({"latents": "tree"}, ConfigError, "latents: 'tree' is no latent id"),
        ({"latents": 0.5}, TypeError, "latents: 0.5 is no latent id"),
        ({"config": {"latents": [3, 99]}}, ConfigError, "latents: 99 is out of range"),
        ({"config": {"evidence": {"tokns": 3}}}, ConfigError, "evidence.tokns: no such field. Did you mean 'tokens'"),
        ({"config": {"evidence.tokns": 3}}, ConfigError, "evidence.tokns: no such field. Did you mean 'tokens'"),
        ({"evidnce": {"tokens": 3}}, ConfigError, "evidnce: no such field. Did you mean 'evidence'"),
        ({"config": [3]}, TypeError, "config: list was given; it takes an ExplainConfig, a mapping"),
        ({"config": "keyles"}, ConfigError, "config: no file and no shipped config 'keyles'. Did you mean 'keyless'"),
        ({"scorers": ["detectoin"]}, ConfigError, "'detectoin' is not one of .* Did you mean 'detection'"),
        ({"model": 5}, TypeError, "model: 5 was given; it takes a name, a folder, or a loaded model"),
        ({"progress": "x"}, TypeError, "progress: .*'x'"),
        (
            {"models": {"explainer": "gpt-4o-mini"}},
            ConfigError,
            "OPENAI_API_KEY is not set, and the model 'gpt-4o",
        ),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_loaded(
    explained_coder, tmp_path, monkeypatch, never_loaded, arguments, error, said
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(error, match=said) as found:
        interp.explain(**{"run": explained_coder, "run_dir": tmp_path / "run", **arguments})
    assert "\n" not in str(found.value)
    assert not (tmp_path / "run").exists()


def test_a_coder_that_does_not_say_enough_is_told(explained_coder, tmp_path, never_loaded):
    spec = sae.load(explained_coder).spec
    for changes, said in (
        ({"reads": (), "writes": ()}, r"coder: the one that was given names no site to read; load it with sae.load\("),
        ({"training": {}}, "text.source: the coder does not say what text it was trained on; name one"),
    ):
        with pytest.raises(ConfigError, match=said):
            interp.explain(sae.SparseCoder(spec.with_(**changes)), 3, run_dir=tmp_path / "run")
    assert not files(tmp_path)


def test_a_model_of_another_width_is_told_before_text_is_read(explained_coder, tmp_path):
    from rigs.fakes import tiny_model_folder

    other = tiny_model_folder(tmp_path / "other", hidden_size=32, num_attention_heads=2)
    with pytest.raises(ConfigError, match=r"takes model.layers.1 to have width 16; in .* it has 32"):
        interp.explain(explained_coder, 3, model=other, run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
