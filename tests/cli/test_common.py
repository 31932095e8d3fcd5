"""The shipped configs: each parses, and says in its first line what it is for."""

import pytest

from cli.common import configs, read_config
from interp.run.config import ExplainConfig
from sae.training.config import TrainConfig


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
