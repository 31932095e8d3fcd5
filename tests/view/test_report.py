"""The report of a run, read back from its file: all that was asked for is there, and every figure is the real one."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from rigs.hostile_records import hostile
from rigs.interp_runs import coder_folder
from rigs.pages import blocks, latents_of_blocks

from cli.reports import TRAINED, kind_of
from interp.records import Window
from interp.run.preparing import read_from
from interp.run.rundir import explained_folders, saved_config
from interp.view.explained import ExplainedRun
from interp.view.reporting import report
from interp.view.reporting.blocks import CUT, latent_of_page, window_of_page
from interp.view.reporting.columns import Columns
from interp.view.reporting.report import Report, explained_below, write_report
from sae.base.errors import ConfigError
from sae.base.files import read_json, write_json


@pytest.fixture(scope="module")
def run(explained_coder):
    return ExplainedRun(explained_coder / "explain")


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    return blocks(write_report([run.run_dir], tmp_path_factory.mktemp("page") / "report.html")[0])


def near(value):
    """Returns what a figure of the page equals: it has six digits."""
    return None if value is None else pytest.approx(value, rel=1e-5)


def test_sae_explain_writes_it_beside_its_tables(explained_coder, written):
    assert blocks(explained_coder / "explain" / "report.html") == written


def test_all_that_was_asked_for_is_in_the_index_and_has_a_page(run, written):
    (index,) = written["main"]["runs"]
    assert index["latents"] == run.latents == list(latents_of_blocks(written))
    statuses = Counter(index["statuses"][status] for status in index["explainers"][0]["status"])
    assert statuses == run.summary["explanations"]["token_lookup"]
    assert sum(statuses.values()) == len(run)


def test_a_page_tells_nothing_of_where_its_run_lies(run, written):
    told = json.dumps(written)
    assert str(run.run_dir.parent.parent) not in told


def test_the_index_says_what_the_table_says(run, written):
    (index,) = written["main"]["runs"]
    (explainer,) = index["explainers"]
    scorers = {scorer["name"]: scorer for scorer in explainer["scorers"]}
    rows = run.table().to_pylist()
    assert {row["scorer"] for row in rows} == set(scorers)
    for row in rows:
        at, scorer = index["latents"].index(row["latent"]), scorers[row["scorer"]]
        assert index["fired"][at] == row["fired"]
        assert scorer["value"][at] == near(row["score"])
        if row["score"] is not None:
            assert scorer["low"][at] == pytest.approx(row["score_low"], rel=1e-5)
            assert scorer["coverage"][at] == pytest.approx(row["coverage"], rel=1e-5)
            assert (scorer["n"][at], scorer["headline"]) == (row["n"], row["headline"])
        text = explainer["text"][at]
        assert (None if text is None else index["texts"][text]) == row["explanation"]


def test_the_summary_and_the_null_behind_it(run, written):
    (index,) = written["main"]["runs"]
    for told, real in zip(index["summary"], run.summary["scores"], strict=True):
        assert told["mean"] == pytest.approx(list(real["mean"].values()), rel=1e-5)
        assert (told["statuses"], told["coverage"]) == (real["statuses"], real["coverage"])
        assert sorted(told["nulls"]) == pytest.approx(
            sorted(run.nulls[real["explainer"], real["scorer"]].null), rel=1e-5
        )
    assert index["seen"]["tokens_counted"] == index["tokens"] == run.journals.evidence.tokens


def test_a_page_says_what_the_record_says(run, written):
    pages = latents_of_blocks(written)
    for record in run:
        page = pages[record.latent]
        assert (page["fired"], page["tokens"], page["status"]) == (record.fired, record.tokens, record.status)
        assert page["facts"]["neighbors"] == [
            [i, pytest.approx(cosine, rel=1e-5)] for i, cosine in record.facts.neighbors
        ]
        for told, label in zip(page["labels"], record.labels, strict=True):
            assert (told["text"], told["status"]) == (label.text, label.status)
            for one, score in zip(told["scores"], label.scores, strict=True):
                measure = score.measures[score.headline]
                assert one["value"] == [near(part) for part in (measure.value, measure.low, measure.high)]
                assert one["measures"].keys() == score.measures.keys()
                assert len(one["judged"]) == len(score.windows)
                assert not any("marks" in seen for seen in one["judged"]), "only fuzzing shows marks to its judge"


def test_histograms_add_up_to_the_counts(written):
    for page in latents_of_blocks(written).values():
        if page["facts"]:
            assert sum(page["facts"]["histogram"]) == sum(page["facts"]["positions"]) == page["fired"]


def test_values_are_those_of_the_coder_in_full_context(run, written):
    """Of the whole rows of text, through the model as anybody would call it."""
    subject, rows, _ = read_from(saved_config(run.run_dir))
    seen = []
    layer = subject.lm.model.get_submodule(subject.coder.spec.reads[0].name)
    layer.register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    checked = 0
    for latent, page in latents_of_blocks(written).items():
        for text, values, _, start, _ in page["windows"][:4]:
            row, place = divmod(start, rows.context_length)
            tokens = rows.tokens(np.array([row]))[:, : rows.length[row]]
            with torch.no_grad():
                subject.lm.model(tokens)
                codes = subject.coder.encode_dense(seen.pop().reshape(-1, subject.coder.spec.d_in))[:, latent]
            pieces = text.split(CUT)
            assert "".join(pieces) == subject.lm.tokenizer.decode(tokens[0, place : place + len(pieces)])
            dense = [values.get(str(i), 0.0) for i in range(len(pieces))]
            masked = np.isin(tokens[0].numpy(), subject.coder.spec.mask.special_ids)
            real = np.where(masked, 0.0, codes.numpy())[place : place + len(pieces)]
            assert dense == pytest.approx(real.tolist(), rel=1e-5, abs=1e-6)
            checked += sum(value > 0 for value in dense)
    assert checked > 40


def test_two_runs_of_one_coder_are_joined_by_id(run, tmp_path):
    shutil.copytree(run.run_dir, tmp_path / "other")
    main = blocks(write_report([run.run_dir, tmp_path / "other"], tmp_path / "two.html")[0])["main"]
    assert main["pairs"]["by"] == "id"
    names = [one["name"] for one in main["runs"]]
    assert len(set(names)) == 2


def test_runs_of_two_coders_are_matched_by_what_they_write(run, explained_coder, tmp_path):
    other = coder_folder(tmp_path / "coder", explained_coder.parent / "model", explained_coder.parent / "text", seed=4)
    shutil.copytree(run.run_dir, other / "explain")
    for name, change in (("env.json", ("coder", "0" * 16)),):
        told = json.loads((other / "explain" / name).read_text())
        (other / "explain" / name).write_text(json.dumps({**told, change[0]: change[1]}))
    config = (other / "explain" / "config.yaml").read_text().replace(f"path: {explained_coder}", f"path: {other}")
    (other / "explain" / "config.yaml").write_text(config)
    pairs = blocks(write_report([run.run_dir, other], tmp_path / "two.html")[0])["main"]["pairs"]
    assert (pairs["by"], len(pairs["pairs"])) == ("decoder", len(run))
    assert all(abs(strength) <= 1 + 1e-6 for *_, strength in pairs["pairs"])
    assert pairs["note"].endswith("by the cosine of their decoders.")
    told = read_json(other / "cfg.json")
    told["writes"][0]["hook"] = "model.layers.9.self_attn.o_proj"
    write_json(other / "cfg.json", told)
    doubted = blocks(write_report([run.run_dir, other], tmp_path / "two.html")[0])["main"]["pairs"]
    assert doubted["pairs"] == pairs["pairs"]
    assert "the other model.layers.9.self_attn.o_proj: the cosine of their decoders tells" in doubted["note"]
    shutil.rmtree(other / "explain", ignore_errors=True)


def test_where_nothing_can_be_matched_it_is_said(run, tmp_path):
    shutil.copytree(run.run_dir, tmp_path / "other")
    (tmp_path / "other" / "config.yaml").unlink()
    (tmp_path / "other" / "env.json").unlink()
    pairs = blocks(write_report([run.run_dir, tmp_path / "other"], tmp_path / "two.html")[0])["main"]["pairs"]
    assert pairs["by"] == ""
    assert "no config.yaml" in pairs["note"]


def test_many_latents_are_pages_of_a_folder_with_one_index(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST", 5)
    target = write_report([run.run_dir], tmp_path / "report.html")[0]
    main = blocks(target)["main"]
    assert main["runs"][0]["latents"] == run.latents
    assert list(blocks(target)) == ["main"]
    found = []
    for first, last, name in main["parts"]:
        part = blocks(tmp_path / name)
        assert part["main"]["index"] == "../report.html"
        mine = list(latents_of_blocks(part))
        assert mine == part["main"]["runs"][0]["latents"] == [one for one in run.latents if first <= one <= last]
        found += mine
    assert found == run.latents


def test_a_page_of_too_many_bytes_is_a_folder_too(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LARGEST", 10_000)
    target = write_report([run.run_dir], tmp_path / "report.html")[0]
    assert (tmp_path / "report").is_dir()
    assert blocks(target)["main"]["parts"]


def test_a_server_makes_the_same_blocks_one_by_one(run, written):
    page = Report([run])
    assert json.loads(json.dumps(page.main(live=True))) == {**written["main"], "live": True}
    assert json.loads(json.dumps(page.block("0/0"))) == written["0/0"]
    for name in ("1/0", "0/1", "x", "0/-1", "../main", "0/0/0"):
        with pytest.raises(KeyError):
            page.block(name)


def test_text_of_strangers_is_made_visible_once(run, tmp_path):
    class Hostile(ExplainedRun):
        def records(self, latents):
            return map(hostile, super().records(latents))

    target, told = tmp_path / "page.html", report.Report([Hostile(run.run_dir)])
    report._write(target, told, report.Span())
    assert "alert(1)" not in target.read_text(encoding="utf-8")
    found = blocks(target)
    text = json.dumps(found, ensure_ascii=False)
    assert not [one for one in "\u202e\u200b\x1b" if one in text]
    page = latents_of_blocks(found)[0]
    seen = "</script><script>alert(1)</script>\"'<!-- \\u{202e}\\u{200b}\\u{7f}\\u{1b}[2J \U0001f600 <<x>>"
    (label,), facts = page["labels"], page["facts"]
    assert [label[name] for name in ("explainer", "by", "text", "reason")] == [seen] * 4
    assert facts["promoted"] == [seen]
    assert facts["top_tokens"] == [[seen, 0.5]]
    assert page["windows"][0][0].split(CUT)[0] == seen
    assert label["scores"][0]["judged"][0]["reason"] == seen
    assert label["scores"][0]["asked"] == [[seen, seen]]
    (index,) = found["main"]["runs"]
    assert index["explainers"][0]["name"] == seen
    assert seen in index["texts"]


def test_tokens_that_are_told_with_others_keep_their_places():
    window = Window(0, 640, (5, 6, 7, 8), "a\U0001f600b", (0, 1, 1, 2, 3), (0.0, 3.0, 1.0, 2.0), 1)
    assert window_of_page(window) == [f"a{CUT}\U0001f600{CUT}b", {1: 3.0, 2: 2.0}, 0, 640, 1, [0, 2, 3]]


def test_a_text_of_any_length_is_short_in_the_index_and_whole_with_its_latent(run):
    long, (record, *_) = "word " * 2_000, (one for one in run if one.label and one.label.text)
    record = replace(record, labels=(replace(record.labels[0], text=long, by="by" * 10**6),))
    columns = Columns()
    columns.add(record)
    assert max(map(len, columns.to_json()["texts"])) < 1_100
    label = latent_of_page(record)["labels"][0]
    assert label["text"] == long
    assert len(label["by"]) < 300


def test_which_runs_lie_in_a_folder(explained_coder, tmp_path):
    assert (
        explained_below(explained_coder)
        == explained_below(explained_coder / "explain")
        == [explained_coder / "explain"]
    )
    assert explained_below(tmp_path) == []
    trained = tmp_path / "trained"
    for name in ("layers.1", "layers.2/k=4"):
        shutil.copytree(explained_coder / "explain", trained / "coders" / name / "explain")
    found = [trained / "coders" / name / "explain" for name in ("layers.1", "layers.2/k=4")]
    assert explained_below(trained) == explained_folders(trained) == found
    (trained / "metrics.jsonl").touch()
    assert kind_of(trained) == TRAINED
    page = blocks(write_report([trained])[0])["main"]
    assert [one["name"] for one in page["runs"]] == ["layers.1", "layers.2/k=4"]
    with pytest.raises(ConfigError, match="no explained run"):
        write_report([tmp_path])


def test_a_run_of_a_folder_that_holds_several_is_one_page_of_tabs(run, tmp_path):
    for site in ("a", "b"):
        shutil.copytree(run.run_dir, tmp_path / "coder" / "explain" / site)
    target = write_report([tmp_path / "coder"])[0]
    assert target == tmp_path / "coder" / "explain" / "report.html"
    assert [one["name"] for one in blocks(target)["main"]["runs"]] == ["a", "b"]
