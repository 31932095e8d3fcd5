"""interp in a notebook: explained runs and examples as objects, from whatever a folder can be called by."""

from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

import interp
from sae.base.errors import ConfigError
from sae.base.files import read_json


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
    assert len(found) == 16
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
        with pytest.raises(
            TypeError, match=r"is no run; give its folder, or what sae\.train or interp\.explain returned"
        ):
            interp.results(none)
    with pytest.raises(ConfigError, match="no such folder"):
        interp.results(tmp_path / "none")
    with pytest.raises(ConfigError, match="is no explained run"):
        interp.examples(explained_coder.parent / "model", 3)
