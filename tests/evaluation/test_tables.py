"""Figures for pandas: a row a coder, a column a figure."""

import builtins
import json

import pandas as pd
import pytest

import sae
from sae.base.errors import ConfigError

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
