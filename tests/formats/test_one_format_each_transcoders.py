"""Transcoders, crosscoders and their like: what lies in one format is not taken for another."""

import pytest
from formats import test_circuit_tracer as circuit_tracer
from formats import test_cross_layer_transcoder as cross_layer
from formats import test_gemma_scope_2 as gemma_scope_2

from sae import formats
from sae.untrusted.files import LocalFiles

FIXTURES = {
    "gemma_scope_2": [
        lambda root: gemma_scope_2.write(root, "resid_post/layer_17_width_16k_l0_big"),
        lambda root: gemma_scope_2.write(root, "x", gemma_scope_2.config_of(17, "transcoder"), affine=True),
        lambda root: gemma_scope_2.write_layers(root, "clt/width_262k_l0_big_affine", affine=True),
        lambda root: gemma_scope_2.write_layers(root, "crosscoder/layer_1_2_3_width_65k_l0_big"),
    ],
    "circuit_tracer": [
        lambda root: circuit_tracer.write(root),
        lambda root: circuit_tracer.write(root, "jumprelu", config=None, skip=True),
        lambda root: circuit_tracer.write(root, turned=True),
    ],
    "cross_layer_transcoder": [
        lambda root: cross_layer.write(root),
        lambda root: cross_layer.write(root, jumps=False, skip=True, config=""),
    ],
}
CASES = [(name, number) for name, makers in FIXTURES.items() for number in range(len(makers))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_every_fixture_is_in_one_format(tmp_path, name, number):
    FIXTURES[name][number](tmp_path)
    (place,) = formats.candidates(LocalFiles(tmp_path))
    assert formats.formats_of(place) == [name]
