"""The README is run: its Python block, its commands' options, its links; and every shipped config parses."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae
from cli.common import configs, read_config
from cli.explain import command as explain
from cli.train import command
from interp.explainers import Explainer
from interp.run.config import ExplainConfig
from interp.scorers import Scorer
from sae.base.plugins import names as plugins
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.selection.topk import TopK
from sae.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    site = Site("model.layers.2", model="quickstart")
    coder = SparseCoder(CoderSpec(256, 256, 512, TopK(8), reads=(site,), writes=(site,)))
    initialize(coder, torch.zeros(256), 0)
    sae.save(coder, "runs/quickstart/coders/model.layers.2")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    assert names["out"].shape == (2, 5, 256)
    torch.testing.assert_close(names["x_hat"], names["out"])
    clean = names["lm"].model(names["tokens"]).logits
    torch.testing.assert_close(names["same"], clean, rtol=1e-4, atol=1e-4)
    assert (names["logits"] - clean).abs().max() > 0.1


def test_no_figure_is_missing():
    assert not re.findall(r"@[A-Z]+@", README)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for path in re.findall(r"`(tests/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


def test_options_named_are_known(capsys):
    with pytest.raises(SystemExit):
        command(["--help"])
    text = capsys.readouterr().out
    for option in re.findall(r"`sae-train (--[\w-]+)", README):
        assert option in text
    with pytest.raises(SystemExit):
        explain(["--help"])
    text = capsys.readouterr().out
    for option in re.findall(r"`(--(?:shard|retry-failed|null|dry-run)[\w-]*)", README):
        assert option in text


@pytest.mark.parametrize("name", configs("train"))
def test_every_shipped_config_parses(name):
    path = configs("train")[name]
    config = read_config(TrainConfig, path, [])
    config.validate()
    assert config.coder.width(256) >= 1
    assert path.read_text(encoding="utf-8").startswith("# "), "the first line says what it is for: --list-configs"


@pytest.mark.parametrize("name", configs("explain"))
def test_every_shipped_config_of_explaining_parses(name, tmp_path):
    path = configs("explain")[name]
    config = read_config(ExplainConfig, path, [f"--coder.path={tmp_path}"])
    config.validate()
    assert path.read_text(encoding="utf-8").startswith("# "), "the first line says what it is for: --list-configs"


def test_explainers_and_scorers_are_all_told():
    for name in (*plugins(Explainer), *plugins(Scorer)):
        assert f"`{name}`" in README, name


def test_loading_needs_no_other_import(tmp_path):
    """In a process of its own: nothing else has registered the plug-ins that a saved spec names."""
    coder = SparseCoder(CoderSpec(4, 4, 8, TopK(2)))
    sae.save(coder, tmp_path)
    code = f"import sae; print(sae.load({str(tmp_path)!r}).spec.selection)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(TopK(2))
