"""sae-view RUN and sae-view RUN_A RUN_B: what is written where, and what no run is."""

import json

import pytest
from rigs.explained_runs import write_explained_run
from rigs.pages import blocks
from rigs.recorded import recorded

from cli.view import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return recorded(tmp_path / "runs" / "a", {"x": (0.2, 8.0)})


def test_a_run_has_its_page_in_its_folder_or_where_it_is_told(folder, tmp_path, capsys):
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert main([str(folder), "--out", "page.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": ["page.html"]}
    assert (tmp_path / "page.html").read_bytes() == (folder / "report.html").read_bytes()


def test_two_runs_are_one_page_here(folder, tmp_path, capsys):
    other = recorded(tmp_path / "runs" / "b", {"y": (0.1, 16.0)})
    assert main([str(folder), str(other)]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    assert [run["label"] for run in blocks(tmp_path / "comparison.html")["main"]["runs"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["runs/aa"], "error: RUN: no such folder: runs/aa. Did you mean"),
        (["runs"], "error: RUN: runs is no run: it holds no metrics.jsonl, which sae-train writes, and no shards"),
        (["runs/a/coders/x"], "Did you mean '{tmp}/runs/a'?"),
        (["runs/a", "--out", "runs"], "error: --out: runs is a folder; name a file"),
        (["runs/a", "runs/e"], "RUN: runs/a is a training run, runs/e is an explained run; runs of one kind are"),
    ],
)
def test_what_is_no_run_is_one_line_that_names_the_nearest(folder, tmp_path, capsys, typed, said):
    (tmp_path / "runs" / "e" / "shards").mkdir(parents=True)
    assert main(typed) == 2
    told = capsys.readouterr().err
    assert said.format(tmp=tmp_path) in told
    assert told.count("\n") == 1


def test_a_log_that_cannot_be_read_is_one_line(folder, capsys):
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    assert main([str(folder)]) == 1
    assert (
        capsys.readouterr().err
        == f"error: {folder}/metrics.jsonl: no line of it can be read; it is no log of a run, or damaged\n"
    )


def test_a_run_whose_latents_are_explained_has_both_pages_and_one_leads_to_the_other(folder, capsys):
    write_explained_run(folder / "explain", 3)
    assert main([str(folder), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert written == [str(folder / "report.html"), str(folder / "explain" / "report.html")]
    explained = blocks(folder / "report.html")["main"]["runs"][0]["explained"]
    assert explained == [{"name": "explain", "href": "./explain/report.html"}]
    assert main([str(folder / "explain"), "--out", "latents.html"]) == 0
    assert capsys.readouterr().out == "latents.html\n"


def test_a_file_or_no_name_for_the_page_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert main(["notes.txt"]) == 2
    assert "RUN: notes.txt is a file; give the folder of a run" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    for typed in ("", "run"):
        assert main(["run", "--out", typed]) == 2
        assert "is a folder; name a file, such as " in (said := capsys.readouterr().err)
        assert "report.html" in said
