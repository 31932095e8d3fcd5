"""Folders that an older version wrote go on, as that version would have: the run of tests/make/run_v0.py.

To rounding: the older version added the same numbers up in another order.
"""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rigs.fake_llm import FakeLLM
from rigs.interp_runs import scripted
from rigs.runs import lines

import cli.explain
import cli.train
import sae
from sae.base.files import load_tensors
from sae.lm import models

GOLDEN = Path(__file__).parents[1] / "golden" / "run-v0"
MADE_BY = json.loads((GOLDEN / "made_by.json").read_text())
CODERS = ["model.layers.1/topk", "model.layers.1/mutual"]


@pytest.fixture
def folder(tmp_path, monkeypatch, quick):
    """A copy of the older version's folder, below which all paths in it lie."""
    shutil.copytree(GOLDEN, tmp_path / "run-v0")
    monkeypatch.chdir(tmp_path / "run-v0")
    # the digest covers defaults that transformers adds from version to version; that it is compared is tested elsewhere
    monkeypatch.setattr(models, "_config_digest", lambda config: MADE_BY["config"])
    return tmp_path / "run-v0"


def test_a_killed_run_goes_on_as_the_version_that_began_it(folder, capsys):
    assert len(lines(folder / "run")) > 20  # lines after the checkpoint, which it cuts off
    assert cli.train.main(["--resume", "run"]) == 0, capsys.readouterr()
    old, new = ((folder / name / "metrics.jsonl").read_text() for name in ("expected", "run"))
    for before, now in zip(*(map(json.loads, text.splitlines()) for text in (old, new)), strict=True):
        assert now.keys() == before.keys()
        assert (now["step"], now["coder"]) == (before["step"], before["coder"])
        assert now.get("fvu", 0.0) == pytest.approx(before.get("fvu", 0.0), rel=1e-3)
    for name in CODERS:
        old, new = (load_tensors(Path(where, "coders", name, "sae.safetensors")) for where in ("expected", "run"))
        assert new.keys() == old.keys()
        for key in old:
            torch.testing.assert_close(new[key], old[key], rtol=1e-3, atol=1e-4)


def test_the_coders_of_an_older_run_are_read(folder):
    coders = sae.load_all("expected")
    figures = json.loads((folder / "expected" / "evaluation.json").read_text())
    assert sorted(coders) == sorted(f"coders/{name}" for name in CODERS)
    for name, coder in coders.items():
        stored = load_tensors(folder / "expected" / name / "sae.safetensors")
        assert torch.equal(coder.W_dec, stored["W_dec"])
        assert coder.spec.metrics == figures[name.removeprefix("coders/")]


def test_an_explanation_goes_on_and_asks_for_nothing_twice(folder, capsys):
    with FakeLLM(scripted) as server:
        assert cli.explain.main(["--config", "explain.yaml", f"--models.explainer.base_urls=[{server.url}]"]) == 0
    assert len(server.calls) == MADE_BY["calls_to_go_on"]
    tables = ("expected/results.parquet", "explained/results.parquet", "explained/measures.parquet")
    old, new, measures = (pq.read_table(folder / path).to_pylist() for path in tables)
    figures = defaultdict(dict)
    for row in measures:
        names = (row["measure"], f"{row['measure']}_low", f"{row['measure']}_high")
        figures[row["latent"], row["explainer"], row["scorer"]] |= zip(names, list(row.values())[-3:], strict=True)
    ABSENT = {"explanation": "", "reason": "", "answers": "", "n": 0, "invalid": 0}  # what is null now
    for before, now in zip(old, new, strict=True):
        told = figures[now["latent"], now["explainer"], now["scorer"]] | now
        for key, value in before.items():
            if key == "reason" and not value:
                continue  # older versions gave none where nothing was found
            there = ABSENT.get(key) if told.get(key) is None else told[key]
            assert there == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key
