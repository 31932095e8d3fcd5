"""Coders of older versions of the format load as they were; those of newer ones are refused with the way out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sae
from cli.evaluate import main as sae_eval
from sae.base.errors import DataError
from sae.base.files import sha256_file
from sae.coder.normalization import Normalization
from sae.coder.spec import FORMAT_VERSION
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection.topk import TopK

GOLDEN = Path(__file__).parent.parent / "golden" / "coder-v1"


@pytest.fixture
def old(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "old")


def config_of(folder):
    return json.loads((folder / "cfg.json").read_text())


def expected():
    return {name: torch.tensor(rows) for name, rows in json.loads((GOLDEN / "expected.json").read_text()).items()}


def assert_computes_what_it_did(coder):
    was = expected()
    found = coder(was["x"])
    dense = found.latents.to_dense()
    assert torch.equal(dense != 0, was["latents"] != 0)
    torch.testing.assert_close(dense, was["latents"], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(found.out, was["out"], atol=1e-5, rtol=1e-6)


def test_the_golden_coder_is_one_of_version_1():
    config = config_of(GOLDEN)
    assert config["format_version"] == 1 < FORMAT_VERSION
    assert "sha256" not in config
    assert "undo_eps" not in config["normalization"]
    assert expected()["latents"].count_nonzero(1).tolist() == [3, 3, 3, 3, 3]


def test_version_1_loads_and_computes_what_it_did():
    coder = sae.load(GOLDEN)
    assert_computes_what_it_did(coder)
    for name, tensor in load_file(GOLDEN / "sae.safetensors").items():
        assert torch.equal(getattr(coder, name), tensor)
    site, spec = Site("model.layers.1", model="some/model", revision="0123abc"), coder.spec
    assert spec.format_version == FORMAT_VERSION
    assert (spec.reads, spec.writes, spec.selection, spec.skip) == ((site,), (site,), TopK(3), True)
    assert spec.normalization == Normalization("layer_norm", eps=1e-3, unbiased=True, undo_eps=True)
    assert spec.mask == MaskSpec((0, 2), 1, {"model.layers.1": 34.5})
    assert (spec.variance, spec.training, spec.metrics) == (
        2.5,
        {"tokens": 1000, "seed": 0},
        {"reconstruction": {"fvu": 0.25}},
    )


def test_it_is_saved_as_the_present_version(tmp_path):
    sae.save(sae.load(GOLDEN), tmp_path / "new")
    config = config_of(tmp_path / "new")
    assert config["format_version"] == FORMAT_VERSION
    assert config["sha256"] == sha256_file(tmp_path / "new" / "sae.safetensors")
    again = sae.load(tmp_path / "new")
    assert again.spec == sae.load(GOLDEN).spec
    assert_computes_what_it_did(again)


def test_eps_would_show_in_what_it_computes(old):
    config = config_of(old)
    config["normalization"]["undo_eps"] = False
    (old / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError):
        assert_computes_what_it_did(sae.load(old))


def test_a_newer_version_is_refused_with_the_way_out(old, capsys):
    (old / "cfg.json").write_text(json.dumps({**config_of(old), "format_version": 99, "new_field": 1}))
    with pytest.raises(
        DataError, match=r"cfg\.json: format_version: 99 is newer than \d+; upgrade sae-interp to read it"
    ):
        sae.load(old)
    assert sae_eval([str(old)]) == 1
    assert "99 is newer than" in capsys.readouterr().err


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [1], 10**400])
def test_what_is_no_version_is_refused(old, version):
    (old / "cfg.json").write_text(json.dumps({**config_of(old), "format_version": version}))
    with pytest.raises(DataError, match=r"cfg\.json: format_version: "):
        sae.load(old)


def test_a_field_that_version_1_does_not_have_is_refused(old):
    (old / "cfg.json").write_text(json.dumps({**config_of(old), "d_saee": 20}))
    with pytest.raises(DataError, match=r"d_saee: no such field\. Did you mean 'd_sae'"):
        sae.load(old)
