"""What a run tells in the end: every latent that was asked for, with its null, whatever came in which command."""

import json
import re
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from rigs.fake_llm import FakeLLM
from rigs.interp_runs import explain_config, explained, prepare_apart, run, scores, scripted, tiny_coder, with_llm

from interp.run.config import ExplainConfig
from interp.run.flows import OK
from interp.run.results import summary_lines, write_results
from interp.run.rundir import scores_in
from sae.base.errors import ConfigError
from sae.base.settings import decode, read_yaml

ABLE = {"logprobs": 0, "schemas": ("json_schema",)}


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return tiny_coder(tmp_path_factory.mktemp("results"), documents=120)


@pytest.fixture(scope="module")
def prepared(coder, tmp_path_factory):
    return prepare_apart(coder, tmp_path_factory.mktemp("evidence"), {"evidence.tokens": 100_000, "latents": "44"})


def config_of(coder, run_dir, changes=None):
    return explain_config(coder, run_dir, {"evidence.tokens": 100_000, **(changes or {})})


def some(prepared, n):
    return replace(prepared, latents=prepared.latents[:n])


def told(run_dir):
    """The summary and the table of a run, by what its folder says of it."""
    config = decode(ExplainConfig, read_yaml(run_dir / "config.yaml"))
    summary = write_results(run_dir, config.all_scorers(), {})
    return summary, pq.read_table(run_dir / "results.parquet").to_pylist()


def test_texts_without_a_rule_go_unjudged_where_there_is_no_judge(coder, prepared, tmp_path):
    changes = {"explainers": {name: {"type": name} for name in ("single_token", "next_token", "output_centric")}}
    _, ended = run(config_of(coder, tmp_path / "run", changes), prepared)
    assert not ended.failed
    assert not ended.cut_off
    done = {(row["explainer"], row["scorer"]) for row in scores(tmp_path / "run").values() if row["status"] == OK}
    assert ("output_centric", "embedding") in done
    assert not any(scorer == "detection" for _, scorer in done)


def test_a_scorer_that_nobody_can_judge_is_refused(coder, tmp_path):
    for name in ("intruder", "simulation"):
        with pytest.raises(ConfigError, match=rf"scorers.{name}: asks a judge; set models.judge.model"):
            config_of(coder, tmp_path / "run", {"scorers": {name: {"type": name}}})
    config_of(coder, tmp_path / "run", {"scorers": {"surprisal": {"type": "surprisal"}}})  # by the subject


def test_a_file_of_the_name_of_an_explainer_is_refused(coder, tmp_path):
    (file := tmp_path / "token_lookup.jsonl").write_text('{"latent": 3, "text": "x"}\n')
    changes = {"explanations": str(file), "explainers": {"token_lookup": {"type": "token_lookup"}}}
    with pytest.raises(ConfigError, match=r"token_lookup.jsonl would be taken for .*'token_lookup'"):
        config_of(coder, tmp_path / "run", changes)


def test_a_model_may_come_later_and_all_of_the_run_is_told(coder, prepared, tmp_path):
    folder, few = tmp_path / "run", some(prepared, 8)
    scorers = {"detection": with_llm("")["scorers"]["detection"], "embedding": {"type": "embedding"}}
    run(config_of(coder, folder, {"scorers": scorers}), few)
    before = scores(folder)
    with FakeLLM(scripted, **ABLE) as server:
        llm = with_llm(server.url)
        run(config_of(coder, folder, llm), few)
        run(config_of(coder, folder, {**llm, "scorers": {"intruder": {"type": "intruder"}}}), few)
        other = {**llm, "models.explainer": {**llm["models.explainer"], "model": "another"}}
        with pytest.raises(ConfigError, match=r"model: 'another', but .* holds a run with 'fake'"):
            run(config_of(coder, folder, other), few)
        larger = {**llm, "scorers": {"detection": {**scorers["detection"], "windows_per_request": 3}}}
        with pytest.raises(ConfigError, match=r"scorers.detection.windows_per_request: 3, but .* with 24"):
            run(config_of(coder, folder, larger), few)
    after = scores(folder)
    assert all(after[key] == row for key, row in before.items())
    summary, _ = told(folder)
    found = {(one["explainer"], one["scorer"]) for one in summary["scores"]}
    assert found >= {
        ("token_lookup", "detection[rule]"),
        ("token_lookup", "embedding[tfidf]"),
        ("llm", "detection[fake]"),
        ("", "intruder[fake]"),
    }
    config = decode(ExplainConfig, read_yaml(folder / "config.yaml"))
    assert set(config.explainers) == {"token_lookup", "llm"}
    assert set(config.scorers) == {"detection", "embedding", "fuzzing", "intruder"}


def first(asked):
    """A judge that takes the first of some texts for the odd one."""
    return json.dumps({"id": re.findall(r"=== \w+ (\w+)\n", asked.text)[0]}) if "=== " in asked.text else "hello"


def test_guessing_is_the_null_of_what_needs_no_explanation(coder, prepared, tmp_path):
    with FakeLLM(first, **ABLE) as server:
        changes = {**with_llm(server.url), "scorers": {"intruder": {"type": "intruder", "windows": 4}}}
        run(config_of(coder, tmp_path / "run", changes), some(prepared, 8))
    summary, table = told(tmp_path / "run")
    (one,) = summary["scores"]
    assert one["null"]["value"] == 0.25
    assert one["lift"]["value"] == pytest.approx(one["mean"]["value"] - 0.25)
    assert {row["null"] for row in table} == {0.25}


@pytest.fixture
def few_are_enough(monkeypatch):
    """Takes ten latents for enough for a null: of the tiny coder's, about half have too few examples."""
    for module in ("pipeline", "results"):
        monkeypatch.setattr(f"interp.run.{module}.FEWEST_FOR_NULL", 10)


@pytest.mark.parametrize("most", [200, 16])
def test_the_null_is_one_of_the_run_in_shards_too(coder, prepared, tmp_path, most, few_are_enough):
    config = config_of(coder, tmp_path / "run", {"null_latents": most})
    for number in (1, 2):
        run(config, prepared, shard=(number, 2))
    summary, _ = told(tmp_path / "run")
    rows = [row for number in (1, 2) for row in scores(tmp_path / "run", f"{number}-of-2").values()]
    nulls = [row for row in rows if row["null"] and row["scorer"] == "detection"]
    usable = sum(row["scorer"] == "detection" and not row["null"] for row in rows)
    assert len(nulls) == min(usable, most) > 10
    assert len({row["of"] for row in nulls}) == len(nulls)
    assert all(row["of"] != row["latent"] for row in nulls)
    assert all(one["null"]["value"] is not None for one in summary["scores"])


def test_more_latents_change_no_null_that_is_there(coder, prepared, tmp_path, few_are_enough):
    config = config_of(coder, tmp_path / "run")
    run(config, some(prepared, 30))
    before = {key: row for key, row in scores(tmp_path / "run").items() if row["null"]}
    run(config, prepared)
    after = scores(tmp_path / "run")
    assert len(before) > 20
    assert all(after[key] == row for key, row in before.items())
    assert sum(row["null"] for row in after.values()) > len(before)


def test_what_failed_is_no_figure_and_what_is_missing_has_its_row(coder, prepared, tmp_path):
    config = config_of(coder, tmp_path / "run")
    run(config, some(prepared, 24))
    summary, _ = told(tmp_path / "run")
    (before,) = [one for one in summary["scores"] if one["scorer"] == "detection[rule]"]
    journal = scores_in(tmp_path / "run" / "shards" / "1-of-1")
    failed = next(row for row in journal.rows() if row["scorer"] == "detection" and row["status"] == OK)
    score = failed["score"] | {"measures": {"balanced_accuracy": {"value": 1e6, "low": None, "high": None}}}
    journal.append({**failed, "status": "failed", "score": score})
    latents = tmp_path / "run" / "shards" / "1-of-1" / "latents.json"
    asked = json.loads(latents.read_text())
    beyond = max(asked) + 1000
    latents.write_text(json.dumps([*asked, beyond]))
    summary, table = told(tmp_path / "run")
    (one,) = [one for one in summary["scores"] if one["scorer"] == "detection[rule]"]
    assert one["latents"] == before["latents"] - 1
    assert one["mean"]["value"] <= 1
    assert sum(one["statuses"].values()) == summary["latents"] == 25
    assert summary["explanations"]["token_lookup"]["missing"] == 1
    assert [row["status"] for row in table if row["latent"] == beyond] == ["missing"] * 2
    (row,) = [row for row in table if (row["latent"], row["scorer"]) == (failed["latent"], "detection[rule]")]
    assert (row["status"], row["score"], row["balanced_accuracy"]) == ("failed", None, None)
    assert f"{one['latents']} of 25 latents" in "\n".join(summary_lines(summary))
    statuses = {row["latent"]: row["status"] for row in explained(tmp_path / "run").values()}
    short = [latent for latent, status in statuses.items() if status == "insufficient"]
    assert {row["status"] for row in table if row["latent"] in short} <= {"insufficient"}
    assert len([row for row in table if row["scorer"] == "detection[rule]"]) == 25
