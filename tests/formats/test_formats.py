"""Formats share file names: what is in one is not taken for another, and what is in none is said to be."""

import pytest
import torch
from rigs.format_files import D_IN, D_SAE, Draw
from rigs.released import dictionary_learning
from rigs.released.every import EVERY
from safetensors.numpy import save_file

from sae import formats
from sae.untrusted.files import LocalFiles


def test_there_is_a_coder_of_every_format():
    assert {name.split()[0] for name in EVERY} == formats.formats().keys()


@pytest.mark.parametrize("name", EVERY)
def test_each_is_recognized_by_its_own_format_alone(tmp_path, name):
    EVERY[name](tmp_path)
    (place,) = formats.candidates(LocalFiles(tmp_path))
    assert formats.formats_of(place) == [name.split()[0]]


def test_weights_of_known_names_without_their_configs_are_in_no_format(tmp_path):
    for name in ("sae.safetensors", "sae_weights.safetensors", "checkpoints/final.safetensors", "pruned.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file({"encoder.weight": Draw()(D_SAE, D_IN)}, tmp_path / name)
    found = {place.weights: formats.formats_of(place) for place in formats.candidates(LocalFiles(tmp_path))}
    assert list(found.values()) == [[]] * 4


def test_what_training_leaves_beside_is_in_no_format(tmp_path):
    torch.save(dictionary_learning.OPTIMIZER, tmp_path / "optimizer.pt")
    torch.save({"encoder.weight": torch.ones(3, 2), "encoder.bias": torch.ones(3)}, tmp_path / "model.pt")
    torch.save({"W": torch.Generator}, tmp_path / "trainer_state.pt")  # which asks for an import
    (tmp_path / "broken.pt").write_bytes(b"PK\3\4 is no archive")
    found = {place.name: formats.formats_of(place) for place in formats.candidates(LocalFiles(tmp_path))}
    assert found == {"optimizer.pt": [], "model.pt": [], "trainer_state.pt": [], "broken.pt": []}
