"""Crosscoders of two models: their layout, and the scales that no file holds."""

import pytest
import torch
from rigs.format_files import D_IN, D_SAE, loads
from rigs.released.crosscoder_diff import SCALES, write

import sae
from sae.base.errors import ConfigError, DataError
from sae.lm.site import SECOND


def test_both_models_are_read_side_by_side_at_their_scales(tmp_path):
    folder, wanted = write(tmp_path)
    coder = loads(folder, wanted, scale=SCALES)
    first, second = coder.spec.reads
    assert coder.spec.writes == coder.spec.reads
    assert (first.hook, first.tag, first.width, first.scale) == ("blocks.14.hook_resid_pre", "", D_IN, 0.5)
    assert (second.hook, second.tag, second.width, second.scale) == ("blocks.14.hook_resid_pre", SECOND, D_IN, 2.0)
    assert (first.model, coder.spec.pre_bias, coder.spec.context_length) == ("google/gemma-2-2b", "none", 1024)


def test_the_scales_are_asked_for(tmp_path):
    folder, _ = write(tmp_path)
    with pytest.raises(ConfigError, match=r"^scale: .*3\.pt does not say it \(each model's inputs"):
        sae.load(folder)
    for wrong in ((1.0, 2.0, 3.0), (1.0, 0.0), -1.0):
        with pytest.raises(ConfigError, match=r"^scale: .*(is not one or two positive numbers|must be positive)"):
            sae.load(folder, scale=wrong)
    folder, wanted = write(tmp_path, scales=(3.0, 3.0))
    loads(folder, wanted, scale=3.0)


def test_of_the_released_one_they_are_known(tmp_path):
    path = tmp_path / "ckkissane/crosscoder-gemma-2-2b-model-diff" / "blocks.14.hook_resid_pre"
    folder, wanted = write(path, ("cc_weights.pt", "cfg.json"), (0.2758961493232058, 0.24422852496546169))
    coder = loads(folder, wanted)
    assert [site.model for site in coder.spec.reads] == ["google/gemma-2-2b", "google/gemma-2-2b-it"]


def test_three_models_are_not_two(tmp_path):
    folder, _ = write(tmp_path, W_enc=torch.ones(3, D_IN, D_SAE))
    with pytest.raises(DataError, match=r"tensor W_enc has shape \(3, 6, 20\), expected \(2, 6, 20\)"):
        sae.load(folder, scale=1)
