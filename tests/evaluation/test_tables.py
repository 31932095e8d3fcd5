"""Figures for pandas: a row a coder, a column a figure."""

import builtins
import json

import pandas as pd
import pytest

import sae
from sae.base.errors import ConfigError
from sae.evaluation.tables import Evaluation, table

ONE = {
    "reconstruction": {"fvu": 0.25, "l0": 4.0},
    "density": {"dead_share": 0.0, "counts": [1, 2]},
    "loss": {"ce": 3.0},
}
OTHER = {"reconstruction": {"fvu": 0.5, "l0": 8.0}, "density": {"dead_share": 0.5, "counts": [2, 1]}}


def test_of_one_and_of_several_coders():
    (row,) = sae.to_pandas(ONE).to_dict("records")
    assert row["reconstruction.fvu"] == 0.25
    assert row["density.counts"] == [1, 2]
    table = sae.to_pandas({"a": ONE, "b": OTHER})
    assert list(table.index) == ["a", "b"]
    assert table["reconstruction.l0"].tolist() == [4.0, 8.0]
    assert pd.isna(table.loc["b", "loss.ce"])


def test_of_a_runs_folder(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"a": ONE, "b": OTHER}))
    wanted = sae.to_pandas({"a": ONE, "b": OTHER})
    for where in (tmp_path, str(tmp_path), tmp_path / "evaluation.json"):
        pd.testing.assert_frame_equal(sae.to_pandas(where), wanted)
    with pytest.raises(ConfigError, match=r"^found: no such file: .*absent"):
        sae.to_pandas(tmp_path / "absent")


def test_without_pandas_it_is_one_line(monkeypatch):
    usual = builtins.__import__

    def without(name, *rest):
        if name == "pandas":
            raise ImportError(name)
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"^to_pandas: pandas is not installed; pip install pandas$"):
        sae.to_pandas(ONE)


WHOLE = {
    "reconstruction": {"tokens": 10, "fvu": 0.25, "nmse_mean": 0.1, "nmse_median": 0.1, "l0": 4.0, "cosine": 0.9}
    | {"norm_ratio": 1.0, "reconstruction_bias": 1.0},
    "reconstruction_unfiltered": {"tokens": 12, "fvu": 0.5},
    "density": {"dead_share": 0.125, "counted_over_tokens": 12},
}


def test_a_notebook_shows_a_table_of_what_is_still_a_dict():
    one = Evaluation(WHOLE)
    assert json.loads(json.dumps(one)) == WHOLE == one
    assert all(
        f">{name}</td>" in one._repr_html_() and f">{text}</td>" in one._repr_html_() for name, text in table(WHOLE)
    )
    assert "<th" not in one._repr_html_()
    other = WHOLE | {"fvu_by_site": {"<script>": 0.75}}
    both = Evaluation({"a<b>": WHOLE, "c": other})._repr_html_()
    assert "a&lt;b&gt;</th>" in both
    assert "FVU at &lt;script&gt;</td><td" in both
    assert "<script" not in both
    assert both.count("<tr>") == len(table(other)) + 1
