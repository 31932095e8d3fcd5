"""What a run tells in the end: every latent that was asked for, with its null, whatever came in which command."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rigs.fake_llm import Answer, FakeLLM
from rigs.interp_runs import explain_config, explained, prepare_apart, run, scores, scripted, tiny_coder, with_llm

import sae
from interp.run.config import ExplainConfig
from interp.run.reasons import OK
from interp.run.results import write_results
from interp.run.rundir import scores_in
from interp.run.tables import COLUMNS
from interp.run.telling import summary_lines
from sae.base.errors import ConfigError
from sae.base.settings import decode, read_yaml
from sae.loading import hub

ABLE = {"logprobs": 0, "schemas": ("json_schema",)}


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return tiny_coder(tmp_path_factory.mktemp("results"), documents=120)


@pytest.fixture(scope="module")
def prepared(coder, tmp_path_factory):
    changes = {"evidence.tokens": 100_000, "latents": "random:44"}
    return prepare_apart(coder, tmp_path_factory.mktemp("evidence"), changes)


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
    assert {row["null"] for row in table if row["scorer"]} == {0.25}


@pytest.fixture
def few_are_enough(monkeypatch):
    """Takes ten latents for enough for a null: of the tiny coder's, about half have too few examples."""
    for module in ("pipeline", "rows"):
        monkeypatch.setattr(f"interp.run.{module}.FEWEST_FOR_NULL", 10)


@pytest.mark.parametrize("most", [pytest.param(200, marks=pytest.mark.slow), 16])
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


@pytest.mark.slow
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
    assert summary["explanations"]["token_lookup"]["unasked"] == 1
    assert [row["status"] for row in table if row["latent"] == beyond] == ["unasked"] * 2
    (row,) = [row for row in table if (row["latent"], row["scorer"]) == (failed["latent"], "detection[rule]")]
    assert (row["status"], row["score"]) == ("failed", None)
    figures = pq.read_table(tmp_path / "run" / "measures.parquet").to_pylist()
    assert failed["latent"] not in {row["latent"] for row in figures if row["scorer"] == "detection[rule]"}
    assert f"{one['latents']} of 25 latents" in "\n".join(summary_lines(summary, tmp_path / "run"))
    statuses = {row["latent"]: row["status"] for row in explained(tmp_path / "run").values()}
    short = [latent for latent, status in statuses.items() if status == "insufficient"]
    assert {row["status"] for row in table if row["latent"] in short} <= {"insufficient"}
    assert len([row for row in table if row["scorer"] == "detection[rule]"]) == 25


def test_the_table_is_narrow_and_all_figures_are_beside_it(coder, prepared, tmp_path):
    run(config_of(coder, tmp_path / "run", {"latents": "random:12"}))
    summary, table = told(tmp_path / "run")
    schema = pq.read_schema(tmp_path / "run" / "results.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names} == COLUMNS
    figures = pq.read_table(tmp_path / "run" / "measures.parquet").to_pylist()
    found = {tuple(row[name] for name in ("latent", "explainer", "scorer", "measure")): row for row in figures}
    names = {one["scorer"].partition("[")[0]: one["scorer"] for one in summary["scores"]}
    n = 0
    for (latent, scorer, explainer, null), row in scores(tmp_path / "run").items():
        for name, figure in row["score"]["measures"].items() if row["status"] == OK and not null else ():
            there = found[latent, explainer, names[scorer], name]
            assert {key: there[key] for key in ("value", "low", "high")} == figure
            n += 1
    assert n == len(figures) > 100
    tokens = prepared.evidence.tokens
    for row in table:
        assert row["fired"] == prepared.evidence.counts(row["latent"])["fired"]
        assert row["density"] == row["fired"] / tokens
        assert not any(isinstance(value, float) and math.isnan(value) for value in row.values())
        assert "" not in row.values()


def test_each_column_is_told_of():
    text = (Path(__file__).parents[2] / "interp" / "README.md").read_text(encoding="utf-8")
    section = text.partition("`results.parquet`, column by column")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    assert {name for cell in listed for name in re.findall(r"`(\w+)`", cell)} == set(COLUMNS)


def status_of(table, latent):
    return {row["status"] for row in table if row["latent"] == latent}


@pytest.fixture(scope="module")
def one_dead(coder, tmp_path_factory):
    """A coder whose last latent never fires, and the evidence of all of its latents."""
    shutil.copytree(coder, folder := tmp_path_factory.mktemp("dead") / "coder")
    changed = sae.load(folder)
    with torch.no_grad():
        changed.W_enc[-1] = 0.0
    hub.save(changed, folder)
    changes = {"evidence.tokens": 100_000, "latents": "all"}
    return folder, prepare_apart(folder, tmp_path_factory.mktemp("evidence"), changes)


def test_every_latent_asked_for_has_its_row_and_the_counts_add_up(one_dead, tmp_path):
    """Dead, insufficient, failed, and not come to for want of money: of each there is one, and none is lost."""
    (coder, prepared), folder = one_dead, tmp_path / "run"
    latents, dead = prepared.latents.tolist(), prepared.latents.tolist()[-1]
    with FakeLLM(lambda asked: Answer("I would rather not", usage=(2000, 50)), logprobs=0, schemas=()) as server:
        changes = with_llm(server.url, only="explain", budget_usd=0.5, in_flight=1)
        changes["models.explainer"] |= {"price_in": 10.0, "price_out": 10.0, "max_tries": 1, "max_concurrency": 1}
        run(config_of(coder, folder, changes), replace(prepared, latents=prepared.latents[-1:]))
        _, ended = run(config_of(coder, folder, changes), prepared)
    assert "spent" in ended.cut_off
    assert ended.failed
    summary, table = told(folder)
    assert summary["latents"] == len(latents) == 48
    assert all(sum(counts.values()) == len(latents) for counts in summary["explanations"].values())
    assert set(summary["explanations"]["llm"]) >= {"dead", "failed", "unasked"}
    assert summary["failures"]["llm"]["parse"]["latents"] == summary["explanations"]["llm"]["failed"] == ended.failed
    assert sorted({row["latent"] for row in table}) == latents
    assert status_of(table, dead) == {"dead"}
    assert next(row["reason"] for row in table if row["latent"] == dead).startswith("dead: it fires on none of ")
    waiting = {row["latent"] for row in table if row["status"] == "unasked"}
    run(config_of(coder, folder, {**changes, "only": "score"}), some(prepared, 1))  # of one latent
    _, table = told(folder)
    assert waiting <= {row["latent"] for row in table if row["status"] == "unasked"}


def test_a_run_that_asked_nothing_yet_has_its_rows(coder, prepared, tmp_path):
    run(config_of(coder, tmp_path / "run", {"only": "score"}), some(prepared, 3))
    summary, table = told(tmp_path / "run")
    assert [(row["latent"], row["explainer"], row["scorer"], row["status"]) for row in table] == [
        (latent, None, None, "unasked") for latent in prepared.latents[:3].tolist()
    ]
    assert (summary["latents"], summary["explanations"], summary["scores"]) == (3, {}, [])


def test_the_reasons_of_missing_judgements_are_counted_with_the_first_message(coder, prepared, tmp_path):
    folder, words = tmp_path / "run", {"output_centric": {"type": "output_centric"}}
    with FakeLLM(lambda asked: "I would rather not", logprobs=0, schemas=()) as server:
        changes = {**with_llm(server.url), "explainers": words}
        changes["models.judge"] = {**changes.pop("models.explainer"), "max_tries": 1}
        del changes["scorers"]["fuzzing"]
        _, ended = run(config_of(coder, folder, changes), some(prepared, 6))
    summary, table = told(folder)
    (one,) = summary["scores"]
    failed, missing = [row for row in table if row["status"] == "failed"], one["invalid"]["parse"]
    assert len(failed) == one["statuses"]["failed"] == ended.failed > 0
    assert missing["first"]
    assert missing["answers"] == sum(row["invalid"] for row in failed)
    assert all(row["reason"] == f"{row['invalid']} parse ({missing['first']})" for row in failed)
    assert all((row["score"], row["n"], row["coverage"]) == (None, 0, 0) for row in failed)
    assert ended.why == f"{len(failed)} parse ({missing['first']})"
    assert f"    no answer: {missing['answers']} parse ({missing['first']})" in summary_lines(summary, folder)


def test_a_score_of_another_text_is_none_of_this_one(coder, prepared, tmp_path):
    file, few = tmp_path / "mine.jsonl", some(prepared, 12)

    def write(text):
        file.write_text("".join(json.dumps({"latent": i, "text": text}) + "\n" for i in few.latents.tolist()))

    write(prepared.examples(few.latents.tolist()[0]).explain[0].window.text)
    config = config_of(coder, tmp_path / "run", {"explanations": str(file)})
    run(config, few)
    _, table = told(tmp_path / "run")
    assert any(row["score"] is not None for row in table)
    write("words of another")
    run(replace(config, only="explain"), few)
    _, table = told(tmp_path / "run")
    assert {(row["explanation"], row["status"], row["score"]) for row in table} == {
        ("words of another", "unasked", None)
    }


@pytest.mark.slow
def test_what_was_asked_for_is_told(coder, prepared, tmp_path):
    folder = tmp_path / "run"
    run(config_of(coder, folder), prepared)
    summary, table = told(folder)
    lines = "\n".join(summary_lines(summary, folder, prepared.latents.tolist()))
    assert len(re.findall(r"^  latent ", lines, re.MULTILINE)) == 5
    by_status = {row["status"]: row["latent"] for row in table if row["scorer"] == "detection[rule]"}
    asked = sorted([by_status[OK], by_status["insufficient"]])
    lines = summary_lines(summary, folder, asked)
    assert f"(of {summary['latents']} latents in this folder; 2 asked for now)" in lines[1]
    told_of = [line.split(maxsplit=3) for line in lines if line.startswith("  latent ")]
    assert [int(words[1]) for words in told_of] == asked
    said = {int(words[1]): (words[2], words[3]) for words in told_of}
    row = next(row for row in table if row["latent"] == by_status[OK] and row["scorer"] == "detection[rule]")
    assert said[by_status[OK]] == (f"{row['score']:.2f}", row["explanation"])
    assert said[by_status["insufficient"]][0] == "-"
    assert said[by_status["insufficient"]][1].startswith("insufficient: ")
    many = prepared.latents.tolist()[:20]
    best = [int(words.split()[1]) for words in summary_lines(summary, folder, many) if words.startswith("  latent ")]
    assert len(best) == 5
    assert set(best) <= set(many)
