"""Qwen-Scope: k from the repository's name or its config, and never from nowhere."""

import pytest
from rigs.format_files import loads, write_json
from rigs.released.qwen_scope import REPO, write

import sae
from sae.base.errors import ConfigError, DataError


@pytest.mark.parametrize("k", [50, 100])
def test_repository_and_file_say_all(tmp_path, k):
    coder = loads(*write(tmp_path, REPO.replace("L0_50", f"L0_{k}"), k, layer=11))
    site = coder.spec.reads[0]
    assert (site.hook, site.model) == ("blocks.11.hook_resid_post", "Qwen/Qwen3-1.7B-Base")
    assert coder.spec.writes == coder.spec.reads


def test_a_config_says_k_too(tmp_path):
    folder, wanted = write(tmp_path, "elsewhere", k=20)
    write_json(folder / "config.json", {"k": 20, "base_model": "Qwen/Qwen3-1.7B-Base"})
    assert loads(folder, wanted).spec.reads[0].model == "Qwen/Qwen3-1.7B-Base"


def test_without_a_name_k_is_not_guessed(tmp_path):
    folder, _ = write(tmp_path, "elsewhere")
    with pytest.raises(ConfigError, match=r"^k: .*layer7\.sae\.pt does not say .*load it by its repository's name"):
        sae.load(folder)


def test_contradictions_are_refused(tmp_path):
    folder, _ = write(tmp_path)
    write_json(folder / "config.json", {"k": 100})
    with pytest.raises(DataError, match=r"k is 100 in config\.json, but another"):
        sae.load(folder)
    folder, _ = write(tmp_path, REPO.replace("W1K", "W2K"))
    with pytest.raises(DataError, match="says 2K latents, but tensor b_enc has 1024"):
        sae.load(folder)
