"""Every pickle of a coder is recognized by one format, and by no other."""

import pytest
import torch
from formats import test_crosscoder_diff as crosscoder_diff
from formats import test_dictionary_learning as dictionary_learning
from formats import test_dunefsky as dunefsky
from formats import test_e2e_sae as e2e_sae
from formats import test_kissane as kissane
from formats import test_linear_pair as linear_pair
from formats import test_openai as openai
from formats import test_qwen_scope as qwen_scope

from sae import formats
from sae.untrusted.files import LocalFiles

WRITERS = {
    **{
        f"dictionary_learning {kind}": lambda root, kind=kind: dictionary_learning.write(root, kind)
        for kind in dictionary_learning.SHAPES
    },
    "openai top": openai.write,
    "openai relu": lambda root: openai.write(root, "mlp_post_act/autoencoders/2.pt", "ReLU"),
    "linear_pair goodfire": linear_pair.write,
    "linear_pair qresearch": lambda root: linear_pair.write(root, "X-SAE-l19.pt", linear_pair.QRESEARCH),
    "qwen_scope": qwen_scope.write,
    "kissane": kissane.write,
    "dunefsky pt": dunefsky.write,
    "dunefsky gz": lambda root: dunefsky.write(root, ".pkl.gz"),
    "dunefsky autoencoder": lambda root: dunefsky.write(root, is_transcoder=False),
    "e2e_sae": e2e_sae.write,
    "crosscoder_diff": crosscoder_diff.write,
    "crosscoder_diff hub": lambda root: crosscoder_diff.write(root, ("cc_weights.pt", "cfg.json")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_is_recognized_by_its_own_format_alone(tmp_path, name):
    WRITERS[name](tmp_path)
    (place,) = formats.candidates(LocalFiles(tmp_path))
    assert formats.formats_of(place) == [name.split()[0]]


def test_what_training_leaves_beside_is_in_no_format(tmp_path):
    torch.save(dictionary_learning.OPTIMIZER, tmp_path / "optimizer.pt")
    torch.save({"encoder.weight": torch.ones(3, 2), "encoder.bias": torch.ones(3)}, tmp_path / "model.pt")
    torch.save({"W": torch.Generator}, tmp_path / "trainer_state.pt")  # which asks for an import
    (tmp_path / "broken.pt").write_bytes(b"PK\3\4 is no archive")
    found = {place.name: formats.formats_of(place) for place in formats.candidates(LocalFiles(tmp_path))}
    assert found == {"optimizer.pt": [], "model.pt": [], "trainer_state.pt": [], "broken.pt": []}
