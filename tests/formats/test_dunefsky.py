"""Dunefsky's and Chlenski's pickles, whose config is of a class that is not there."""

import logging
import sys

import numpy as np
import pytest
import torch
from rigs.format_files import loads
from rigs.released.dunefsky import FIELDS, write

import sae
from sae.base.errors import ConfigError, DataError


@pytest.mark.parametrize("suffix", [".pt", ".pkl.gz"])
def test_a_transcoder_is_read_without_the_package_of_its_config(tmp_path, suffix, caplog):
    folder, wanted = write(tmp_path, suffix)
    assert not any(name.startswith("sae_training") for name in sys.modules)
    with caplog.at_level(logging.WARNING):
        spec = loads(folder, wanted).spec
    assert [site.hook for site in (*spec.reads, *spec.writes)] == [FIELDS["hook_point"], FIELDS["out_hook_point"]]
    assert {site.model for site in (*spec.reads, *spec.writes)} == {"openai-community/gpt2"}
    assert (spec.pre_bias, spec.context_length) == ("own", 128)
    assert "what the model itself writes at blocks.8.hook_mlp_out has one" in caplog.text
    assert not any(name.startswith("sae_training") for name in sys.modules)


def test_the_trainers_autoencoders_too(tmp_path):
    hooks = {"is_transcoder": False, "hook_point": "blocks.6.hook_resid_pre", "out_hook_point": None}
    spec = loads(*write(tmp_path / "gpt2", wanted_mean=True, **hooks)).spec
    assert (spec.pre_bias, spec.normalization.kind, spec.reads[0].hook) == ("decoder", "center", hooks["hook_point"])
    assert spec.writes == spec.reads
    loads(*write(tmp_path / "gemma", model_name="gemma-2b", **hooks))


def test_the_user_may_say_where_it_reads_and_writes(tmp_path):
    spec = loads(*write(tmp_path), site="a.b->c.d", model="m").spec
    assert [(site.hook, site.model) for site in (*spec.reads, *spec.writes)] == [("a.b", "m"), ("c.d", "m")]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"more": {"b_mid": torch.ones(2)}}, DataError, "tensor b_mid is not part of this format"),
        ({"is_transcoder": False, "more": {"b_dec_out": torch.ones(5)}}, DataError, "tensor b_dec_out is not part of"),
        ({"hook_point_head_index": 3}, ConfigError, "^hook_point_head_index: .* reads one head"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, error, message):
    folder, _ = write(tmp_path, **change)
    with pytest.raises(error, match=message):
        sae.load(folder)


def test_a_pickle_of_another_package_is_refused_by_name(tmp_path):
    torch.save({"cfg": np.random.default_rng(), "state_dict": {}}, tmp_path / "x.pt")
    with pytest.raises(DataError, match="wants to import numpy"):
        sae.load(tmp_path)
