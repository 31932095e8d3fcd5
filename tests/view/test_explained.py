"""What a run keeps for people, read back from its folder: what was judged and asked, what fires together, the null."""

import json
import shutil
import unicodedata

import numpy as np
import pytest
from rigs.explained_runs import HOSTILE, STATUSES, write_explained_run

import interp
from interp.evidence.tally import bin_edges
from interp.run.rundir import scores_in, shown_in
from interp.scoring.misses import SEEN
from interp.view.terminal import lines


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A made-up run with text that means harm everywhere, by scorers of every kind of window."""
    folder = tmp_path_factory.mktemp("made") / "run"
    scorers = ("detection", "fuzzing", "intruder", "simulation", "intervention")
    return write_explained_run(folder, 80, scorers=scorers, hostile=HOSTILE, windows=10)


def test_scores_show_what_the_journal_has_of_their_tasks(explained_coder):
    shard = explained_coder / "explain/shards/1-of-1"
    rows = {(row["latent"], row["scorer"]): row for row in scores_in(shard).rows() if not row["null"]}
    kept = 0
    for record in interp.results(explained_coder):
        for score in record.label.scores:
            row = rows.get((record.latent, score.scorer.split("[")[0]), {})
            tasks = row.get("tasks", {"starts": []})
            places = {starts[0]: i for i, starts in enumerate(tasks["starts"])}
            assert len(score.windows) == min(SEEN, len(places))
            for seen in score.windows:
                at = places[seen.windows[0].start]
                wanted = [tasks[name][at] for name in ("truth", "tier", "decile")]
                assert [seen.truth, seen.tier, seen.decile] == wanted
                assert seen.value == row["values"][at]
                assert (seen.truth > 0) == any(seen.windows[0].activations)
                kept += 1
            assert bool(score.asked) == (not row.get("by_rule", True))
    assert kept > 5 * SEEN


def test_activations_read_back_as_the_same_float32(explained_coder):
    for row in shown_in(explained_coder / "explain/shards/1-of-1").rows():
        record = interp.results(explained_coder)[row["latent"]]
        for name in ("strongest", "sampled"):
            for one, at, values in zip(getattr(record, name), row[name]["at"], row[name]["values"], strict=True):
                found = [one.window.activations[place] for place in at]
                assert found == np.array(values, np.float32).tolist()
                assert sum(map(bool, one.window.activations)) == len(at)
        assert record.facts.together is not None
        assert {one.latent for one in record.facts.together}.isdisjoint({record.latent})


def test_the_largest_activation_is_known_of_every_latent_that_fired(explained_coder, tmp_path):
    run = interp.results(explained_coder)
    found, evidence = run.largest(range(99)), run.journals.evidence
    assert found.keys() == set(range(run.d_sae))
    explained = {one.latent: one.facts.largest for one in run if one.facts}
    assert {latent: found[latent] for latent in explained} == explained
    edges = [*bin_edges(), np.inf]
    for latent, largest in found.items():
        bins = np.flatnonzero(evidence.state["histogram"][latent])
        assert edges[bins[-1]] <= largest < edges[bins[-1] + 1] if len(bins) else largest == 0
    assert len([latent for latent, largest in found.items() if largest and latent not in explained]) > 10
    shutil.copytree(explained_coder / "explain", tmp_path / "explain")
    shutil.rmtree(tmp_path / "explain" / "evidence")
    assert interp.results(tmp_path / "explain").largest(range(99)) == explained


def test_the_null_behind_the_scores_is_told(made):
    run, shard = interp.results(made), made / "shards/1-of-1"
    rows = [row for row in scores_in(shard).rows() if row["status"] in ("ok", "partial")]
    for (explainer, scorer), spread in run.nulls.items():
        name, headline = scorer.split("[")[0], run.journals.scorers[scorer.split("[")[0]].headline
        mine = [row for row in rows if (row["explainer"], row["scorer"]) == (explainer, name)]
        values = [(row["null"], row["score"]["measures"][headline]["value"]) for row in mine]
        assert sorted(spread.own) == sorted(value for null, value in values if not null)
        assert len(spread.own) > 50
        if explainer:
            assert sorted(spread.null) == sorted(value for null, value in values if null)
            assert len(spread.null) > 50
        else:
            assert set(spread.null) == {0.2}


def test_latents_are_read_one_after_the_other(made, monkeypatch):
    run, read = interp.results(made), []
    real = type(run.journals)._counts
    monkeypatch.setattr(type(run.journals), "_counts", lambda self, row: read.append(row["latent"]) or real(self, row))
    records = run.records(run.latents)
    assert next(records).latent == 0
    assert max(read) < 3  # of eighty
    assert [record.latent for record in records] == list(range(1, 80))


def test_every_end_that_work_can_have_is_told(made):
    run = interp.results(made)
    for latent, status in STATUSES.items():
        record = run[latent]
        ends = {label.status for label in record.labels} | {
            score.status for label in record.labels for score in label.scores
        }
        assert status in ends or record.status == status, (latent, ends)
        failed = [
            seen for label in record.labels for score in label.scores for seen in score.windows if seen.value is None
        ]
        assert all(seen.reason == "timeout" and seen.miss is None for seen in failed)
        assert bool(failed) == (status in ("partial", "failed"))


def test_every_kind_of_task_is_shown_as_it_was_judged(made):
    kinds = {}
    for score in [*interp.results(made)[0].labels[0].scores, *interp.results(made)[0].scores]:
        kinds[score.scorer.split("[")[0]] = score.windows
    assert all(len(seen.windows) == 5 for seen in kinds["intruder"])
    assert all(not seen.windows and HOSTILE in seen.clean and seen.text for seen in kinds["intervention"])
    assert all(len(seen.levels) == len(seen.windows[0].activations) for seen in kinds["simulation"])
    assert all(seen.marks for seen in kinds["fuzzing"])


def test_hostile_text_stays_text_in_journal_terminal_and_notebook(made):
    """It is read back as it was, and shown as codes and escapes."""
    run = interp.results(made)
    for path in made.rglob("journal-*.jsonl"):
        data = path.read_bytes()
        assert data.isascii()
        assert all(json.loads(line) for line in data.split(b"\n")[:-1])  # no text ends a line
    for latent in (0, 3, 31, 47, 73):
        record = run[latent]
        for window in [one.window for one in (*record.strongest, *record.sampled)]:
            assert window.pieces()[3] == HOSTILE
        for colors in (False, True):
            for line in lines(record, "", colors):
                told = line.replace("\x1b[1;7m", "").replace("\x1b[0m", "") if colors else line
                assert not [c for c in told if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")]
        for shown in (record._repr_html_(), run._repr_html_()):
            assert "<script" not in shown
            assert "<img" not in shown
            assert not any(unicodedata.category(c) == "Cf" or c == "\x1b" for c in shown)
        assert "\x1b" not in repr(record) + str(record) + repr(run)
