"""A folder with coders, files beside it, and what lies outside."""

import pytest


@pytest.fixture
def root(tmp_path):
    for name in ("cfg.json", "a/sae.safetensors", "a/b/config.json", ".git/config.json", "a/.hidden.json"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "sae.safetensors").write_text("{}")
    return tmp_path / "root"
