"""A run of sae-explain from evidence to results: resumed, in shards, in batches, with failing servers, out of funds."""

import json
from pathlib import Path
from zlib import crc32

import pyarrow.parquet as pq
import pytest
from rigs.fake_llm import Answer, FakeLLM, error
from rigs.interp_runs import explain_config, explained, prepare_apart, run, scores, scripted, tiny_coder, with_llm

from interp.run.flows import AGAIN
from interp.run.reasons import FAILED, INSUFFICIENT, OK
from interp.run.results import write_results
from interp.run.telling import summary_lines
from sae.base.errors import ConfigError, Stopped
from sae.base.progress import Watch

ABLE = {"logprobs": 0, "schemas": ("json_schema",)}


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    """Waits between tries are told in seconds; here in thousandths."""
    monkeypatch.setattr("interp.client.remote.limiter.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("interp.client.remote.limiter.DOWN_S", 0.05)
    monkeypatch.setattr("interp.run.pipeline.POLL_S", 0.01)
    monkeypatch.setattr("interp.client.client.STOP_EVERY_S", 0.002)


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return tiny_coder(tmp_path_factory.mktemp("pipeline"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def prepared(coder, tmp_path_factory):
    """The evidence of all runs here: they are of the same latents."""
    return prepare_apart(coder, tmp_path_factory.mktemp("evidence"))


@pytest.fixture(scope="module")
def whole(coder, prepared, tmp_path_factory):
    """A run with a language model that nothing disturbed: (its config, its server)."""
    folder = tmp_path_factory.mktemp("whole")
    with FakeLLM(scripted, **ABLE) as server:
        config = explain_config(coder, folder, with_llm(server.url))
        run(config, prepared)
        yield config, server


def same_as_whole(run_dir, whole):
    """Raises unless a run came to the rows of the undisturbed one."""
    folder = Path(whole[0].run_dir)
    assert scores(run_dir) == scores(folder)
    assert explained(run_dir) == explained(folder)


def asked(server):
    """The bodies of all calls but the probes of what the server can do."""
    bodies = [json.dumps(call.body, sort_keys=True) for call in server.calls]
    return [body for body in bodies if "=== " in body]


def test_without_a_model_rules_are_written_and_scored(coder, prepared, tmp_path):
    config = explain_config(coder, tmp_path / "run")
    _, ended = run(config, prepared)
    rows = explained(tmp_path / "run")
    assert set(rows) == {(latent, "token_lookup") for latent in prepared.latents.tolist()}
    assert not ended.failed
    found = scores(tmp_path / "run")
    assert {(row["by_rule"], row["scorer"]) for row in found.values() if row["status"] == OK} == {
        (True, "detection"),
        (False, "embedding"),
    }
    for row in found.values():
        assert (row["of"] != row["latent"]) == row["null"]


def test_the_same_settings_give_the_same_bytes(coder, prepared, tmp_path):
    for name in ("one", "two"):
        run(explain_config(coder, tmp_path / name), prepared)
        write_results(tmp_path / name, explain_config(coder, tmp_path / name).all_scorers(), {})
    for file in ("results.parquet", "summary.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert scores(tmp_path / "one") == scores(tmp_path / "two")


def test_a_finished_run_asks_nothing_again(whole, prepared):
    config, server = whole
    before, rows = len(server.calls), scores(Path(config.run_dir))
    pipeline, _ = run(config, prepared)
    assert len(server.calls) == before
    assert scores(Path(config.run_dir)) == rows
    assert pipeline.spent["roles"]["judge"]["calls"] == 0


def test_results_hold_every_latent_with_null_and_lift(whole, prepared):
    config, folder = whole[0], Path(whole[0].run_dir)
    summary = write_results(folder, config.all_scorers(), {"coder": "tiny"})
    table = pq.read_table(folder / "results.parquet").to_pylist()
    assert {row["latent"] for row in table} <= set(prepared.latents.tolist())
    assert {row["scorer"] for row in table} == {"detection[fake]", "detection[rule]", "fuzzing[fake]", "fuzzing[rule]"}
    insufficient = sum(row["status"] == INSUFFICIENT for row in explained(folder).values())
    assert sum(counts.get(INSUFFICIENT, 0) for counts in summary["explanations"].values()) == insufficient
    for one in summary["scores"]:
        if one["explainer"] == "llm":
            assert one["null"]["value"] is not None
            assert one["lift"]["value"] == pytest.approx(one["mean"]["value"] - one["null"]["value"])
            assert one["lift"]["low"] <= one["lift"]["value"] <= one["lift"]["high"]
            assert one["coverage"] == 1
    assert any("null 0." in line for line in summary_lines(summary, folder))


def test_under_twenty_latents_the_null_is_not_available(coder, prepared, tmp_path):
    config = explain_config(coder, tmp_path / "run", {"latents": "random:24", "null_latents": 19})
    run(config, prepared)
    assert not any(row["null"] for row in scores(tmp_path / "run").values())
    summary = write_results(tmp_path / "run", config.all_scorers(), {})
    assert all(one["null"]["value"] is None and one["lift"]["value"] is None for one in summary["scores"])
    assert any("null n/a" in line for line in summary_lines(summary, tmp_path / "run"))


@pytest.mark.parametrize("after", [pytest.param(10, marks=pytest.mark.slow), 70])
def test_stopped_and_continued_is_the_same_and_pays_nothing_twice(coder, prepared, whole, tmp_path, after):
    with FakeLLM(scripted, **ABLE) as server:
        changes = with_llm(server.url, in_flight=3)
        changes["models.explainer"] = {**changes["models.explainer"], "max_concurrency": 3}
        config = explain_config(coder, tmp_path / "run", changes)
        with pytest.raises(Stopped):
            run(config, prepared, watch=Watch(lambda: len(server.calls) >= after))
        assert scores(tmp_path / "run") != scores(Path(whole[0].run_dir))
        run(config, prepared)
        bodies = asked(server)
        assert len(bodies) == len(set(bodies))
    same_as_whole(tmp_path / "run", whole)


@pytest.mark.slow
def test_what_failed_is_counted_and_done_again_on_request(coder, prepared, tmp_path):
    ill = [True]

    def moody(asked):
        refuses = ill and "=== " in asked.text and crc32(asked.text.encode()) % 3 == 0  # no probe, and some
        return Answer(message={"refusal": "I would rather not."}) if refuses else scripted(asked)

    with FakeLLM(moody, **ABLE) as server:
        config = explain_config(coder, tmp_path / "run", with_llm(server.url))
        _, ended = run(config, prepared)
        assert not ended.cut_off  # others were answered
        failed = [key for key, row in explained(tmp_path / "run").items() if row["status"] in AGAIN]
        assert failed
        assert ended.failed >= len({latent for latent, _ in failed})
        assert {row["explanation"] for key, row in explained(tmp_path / "run").items() if key in failed} == {None}
        ill.clear()
        run(config, prepared)
        assert [key for key, row in explained(tmp_path / "run").items() if row["status"] in AGAIN] == failed
        _, ended = run(config, prepared, retry_failed=True)
    assert ended.failed == 0
    assert not [key for key, row in explained(tmp_path / "run").items() if row["status"] in AGAIN]
    assert not [key for key, row in scores(tmp_path / "run").items() if row["status"] == FAILED]


@pytest.mark.slow
def test_an_exhausted_quota_ends_the_run_at_once_and_loses_nothing(coder, prepared, tmp_path):
    with FakeLLM(scripted, **ABLE) as server:
        config = explain_config(coder, tmp_path / "run", with_llm(server.url, in_flight=2))
        server.faults.extend([None] * 60)
        quota = error(429, "You exceeded your current quota", "insufficient_quota")
        server.always = quota
        _, ended = run(config, prepared)
        spent = len(server.calls)
        assert "quota" in ended.cut_off
        assert spent < 60 + 70  # those under way when the first refusal came
        kept = scores(tmp_path / "run")
        assert all(row["status"] == OK for row in kept.values() if row.get("score"))
        server.always = None
        server.faults.clear()
        _, ended = run(config, prepared)
        assert not ended.cut_off
        assert not ended.failed
        bodies = asked(server)
        again = [body for body in set(bodies) if bodies.count(body) > 1]
        assert len(again) <= spent - 60  # only what was refused is asked again
    assert {key: row for key, row in scores(tmp_path / "run").items() if key in kept} == kept


@pytest.mark.slow
def test_a_budget_is_kept(coder, prepared, tmp_path):
    with FakeLLM(scripted, **ABLE) as server:
        changes = with_llm(server.url, budget_usd=0.05)
        changes["models.explainer"] = {**changes["models.explainer"], "price_in": 10.0, "price_out": 10.0}
        config = explain_config(coder, tmp_path / "run", changes)
        pipeline, ended = run(config, prepared)
        assert "budget" in ended.cut_off
        assert 0 < pipeline.spent["usd"] <= 0.05
        pipeline, ended = run(config, prepared)
        assert "a higher --budget-usd goes on" in ended.cut_off
        assert pipeline.client.ledger.usd_in_all <= 0.05  # of both commands
        changes["budget_usd"] = 50.0
        _, ended = run(explain_config(coder, tmp_path / "run", changes), prepared)
        assert not ended.cut_off


@pytest.mark.slow
def test_shards_put_together_are_the_whole(coder, prepared, tmp_path):
    with FakeLLM(scripted, **ABLE) as server:
        changes = with_llm(server.url, null_latents=0)
        del changes["scorers"]["fuzzing"]
        run(explain_config(coder, tmp_path / "whole", changes), prepared)
        config = explain_config(coder, tmp_path / "parts", changes)
        run(config, prepared, shard=(1, 2))
        with pytest.raises(ConfigError, match="shard 2 of 2 is missing"):
            write_results(tmp_path / "parts", config.all_scorers(), {})
        run(config, prepared, shard=(2, 2))
    one = explained(tmp_path / "parts", "1-of-2")
    two = explained(tmp_path / "parts", "2-of-2")
    assert not one.keys() & two.keys()
    assert one | two == explained(tmp_path / "whole")
    assert scores(tmp_path / "parts", "1-of-2") | scores(tmp_path / "parts", "2-of-2") == scores(tmp_path / "whole")
    merged, alone = (write_results(tmp_path / name, config.all_scorers(), {}) for name in ("parts", "whole"))
    assert {**merged, "spent": None} == {**alone, "spent": None}


@pytest.mark.slow
def test_batches_give_the_same_scores_as_live_calls(coder, prepared, whole, tmp_path):
    with FakeLLM(scripted, **ABLE) as server:
        changes = with_llm(server.url)
        changes["models.explainer"] = {**changes["models.explainer"], "via": "batch"}
        config = explain_config(coder, tmp_path / "batch", changes)
        run(config, prepared)
        assert 1 <= len(server.batches) <= 4
    same_as_whole(tmp_path / "batch", whole)


def test_explanations_from_a_file_are_scored_like_any(coder, prepared, tmp_path):
    first = prepared.latents.tolist()[:5]
    file = tmp_path / "theirs.jsonl"
    file.write_text("\n".join(json.dumps({"latent": latent, "text": "words: ab"}) for latent in first))
    with FakeLLM(scripted, **ABLE) as server:
        changes = with_llm(server.url, explanations=str(file))
        run(explain_config(coder, tmp_path / "run", changes), prepared)
        assert set(explained(tmp_path / "run")) == {(latent, "theirs") for latent in first}
        old = scores(tmp_path / "run")
        assert {row["explanation"] for row in old.values()} == {"words: ab"}
        file.write_text(json.dumps({"latent": first[0], "text": "words: cd"}))
        run(explain_config(coder, tmp_path / "run", changes), prepared)
    new = scores(tmp_path / "run")
    assert {key for key in new if new[key] != old[key]} == {key for key in new if key[0] == first[0]}


def test_several_explanations_of_a_latent_are_scored_each(coder, prepared, tmp_path):
    one, other = prepared.latents.tolist()[:2]
    file = tmp_path / "theirs.jsonl"
    texts = [(one, "words: ab"), (other, "words: cd"), (one, "words: ef")]
    file.write_text("\n".join(json.dumps({"latent": latent, "text": text}) for latent, text in texts))
    with FakeLLM(scripted, **ABLE) as server:
        run(explain_config(coder, tmp_path / "run", with_llm(server.url, explanations=str(file))), prepared)
    there = {(one, "theirs"): "words: ab", (other, "theirs"): "words: cd", (one, "theirs#2"): "words: ef"}
    assert {key: row["explanation"]["text"] for key, row in explained(tmp_path / "run").items()} == there
    judged = {
        (latent, explainer): row["explanation"] for (latent, _, explainer, _), row in scores(tmp_path / "run").items()
    }
    assert judged == there


@pytest.mark.slow
def test_explaining_and_scoring_can_be_done_apart(coder, prepared, tmp_path):
    run(explain_config(coder, tmp_path / "run", {"only": "explain"}), prepared)
    assert explained(tmp_path / "run")
    assert not scores(tmp_path / "run")
    run(explain_config(coder, tmp_path / "run", {"only": "score"}), prepared)
    run(explain_config(coder, tmp_path / "whole"), prepared)
    assert scores(tmp_path / "run") == scores(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"examples.test": 13}, "examples.test"),
        ({"seed": 5}, "seed"),
        ({"models.encoder.model": "x"}, "models.encoder"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_only(coder, prepared, tmp_path, changes, named):
    run(explain_config(coder, tmp_path / "run"), prepared)
    with pytest.raises(ConfigError, match=named):
        run(explain_config(coder, tmp_path / "run", changes), prepared)
    run(explain_config(coder, tmp_path / "run", {"in_flight": 3, "null_latents": 21}), prepared)


def test_two_runs_do_not_write_to_one_shard(coder, prepared, tmp_path):
    from sae.base.files import FolderLock

    config = explain_config(coder, tmp_path / "run")
    with FolderLock(tmp_path / "run" / "shards" / "1-of-1"), pytest.raises(ConfigError, match="in use by"):
        run(config, prepared)


@pytest.mark.slow
def test_the_model_that_the_coder_reads_is_not_loaded_again_to_read(coder, prepared, tmp_path, monkeypatch):
    def loaded(*_args):
        raise AssertionError("a second copy was loaded")

    monkeypatch.setattr("interp.client.local.model.load_language_model", loaded)
    config = explain_config(coder, tmp_path / "run", {"scorers": {"surprisal": {"type": "surprisal"}}})
    _, ended = run(config, prepared)
    assert not ended.failed
    found = [row for row in scores(tmp_path / "run").values() if row["status"] == OK]
    assert {row["judge"] for row in found} == {"model"}
    assert len(found) > 5


@pytest.mark.slow
@pytest.mark.parametrize("asks", [False, True])
def test_answers_are_told_where_a_model_is_asked(coder, prepared, tmp_path, monkeypatch, caplog, asks):
    monkeypatch.setattr("sae.base.progress.SECONDS_BETWEEN_LINES", 0.0)
    with FakeLLM(scripted, **ABLE) as server, caplog.at_level("INFO"):
        run(explain_config(coder, tmp_path, with_llm(server.url) if asks else {}), prepared)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("scoring ")]
    assert (len(lines) > 100) == asks, "each answer is told, not only the 24 latents that are done"
    for figure in ("  answers ", "  cached ", "  valid 100%"):
        assert [any(figure in line for line in lines), figure in lines[-1]] == [asks, asks]
