"""Quantized models are read as any other, and their fingerprints tell them apart, where the packages that do so are."""

import logging
from importlib.util import find_spec

import pytest
import torch
from rigs.fakes import sampled_rows, tiny_model_folder

from sae.lm.generation import generate
from sae.lm.hooks import capture, capture_with_gradients
from sae.lm.masking import MaskSpec
from sae.lm.models import load_language_model
from sae.lm.site import Site

INT8 = {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}
KINDS = {
    "bitsandbytes, 4 bits": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.8),
    "bitsandbytes, 8 bits": ("bitsandbytes", {"load_in_8bit": True}, 0.2),
    "torchao, 8 bits": ("torchao", {"quant_method": "torchao", "quant_type": INT8}, 0.1),
}
SITES = [Site("model.layers.0"), Site("model.layers.1.mlp")]


def folder_of(path, size):
    return tiny_model_folder(path, hidden_size=64, intermediate_size=128, initializer_range=size)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_is_read_and_told_from_others(tmp_path, kind):
    package, said, off = KINDS[kind]
    if not find_spec(package):
        pytest.skip(f"{package} is not installed")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    folder, other = folder_of(tmp_path / "a", 0.5), folder_of(tmp_path / "b", 0.25)
    plain = load_language_model(folder)
    lm, again, one = (
        load_language_model(each, kwargs={"quantization_config": said}) for each in (folder, folder, other)
    )
    rows = sampled_rows(plain, 12, 4).data
    found, wanted = capture(lm, SITES, rows), capture(plain, SITES, rows)
    for name, x in wanted.items():
        assert 0 < float((found[name] - x).norm() / x.norm()) < off
    weights = lm.fingerprint()["weights"]
    assert weights == lm.fingerprint()["weights"] == again.fingerprint()["weights"]
    assert weights not in (one.fingerprint()["weights"], plain.fingerprint()["weights"])
    assert all(torch.equal(x, found[name]) for name, x in capture(lm, SITES, rows).items()), "to ask changes nothing"
    gradients = capture_with_gradients(lm, SITES, rows, MaskSpec((0, 1, 2), 1))[1]
    assert all(x.isfinite().all() and x.any() for x in gradients.values())
    assert len(list(generate(lm, rows[0, :4].tolist(), new_tokens=3))) > 0
