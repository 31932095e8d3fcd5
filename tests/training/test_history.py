"""What a run has measured comes back as flat rows."""

import json
import re

import pytest

import sae
from sae.base.errors import ConfigError

LINES = [
    {"step": 1, "coder": "a", "fvu": 0.5, "l0": 4.0},
    {"step": 2, "coder": "a", "fvu": 0.25, "l0": 4.0},
    {"step": 2, "coder": "a", "held_out": {"reconstruction": {"fvu": 0.3}, "heads": {"mean_share": [0.5, 0.5]}}},
]


@pytest.fixture
def run(tmp_path):
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "co', encoding="utf-8")  # it is being written
    return tmp_path


def test_rows_are_those_of_the_log_and_evaluations_have_names_of_their_own(run):
    rows = sae.history(str(run))
    assert rows[:2] == LINES[:2]
    evaluation = {"held_out.reconstruction.fvu": 0.3, "held_out.heads.mean_share": [0.5, 0.5]}
    assert rows[2:] == [{"step": 2, "coder": "a", **evaluation}]


def test_the_last_evaluation_comes_last(run):
    found = {"a": {"reconstruction": {"fvu": 0.125}, "training": {"steps": 3}}}
    (run / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")
    last = {"step": 3, "coder": "a", "held_out.reconstruction.fvu": 0.125, "held_out.training.steps": 3}
    assert sae.history(run)[3:] == [last]


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"run: {tmp_path} holds no metrics.jsonl; it is not the folder")):
        sae.history(tmp_path)
