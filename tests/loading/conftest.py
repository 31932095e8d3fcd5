"""A hub that holds a coder of SAELens and two of Gemma Scope."""

import pytest
from rigs.fake_hub import Faults, fake_hub, reached_from_here
from rigs.hub_coders import AJT, GEMMA, gemma, saelens


@pytest.fixture
def faults():
    return Faults()


@pytest.fixture
def hub(tmp_path, monkeypatch, faults):
    root = tmp_path / "hub"
    saelens(root, AJT)
    gemma(root)
    gemma(root, layer=4, l0=20)
    (root / "models" / GEMMA / "README.md").write_text("# Gemma Scope\n")
    with fake_hub(root, tmp_path / "home", faults) as (environment, asked):
        reached_from_here(monkeypatch, environment)
        yield root, asked
