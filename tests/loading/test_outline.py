"""What a coder on the hub is, from its configs and headers, before its weights are fetched."""

import json

import numpy as np
import pytest
import torch
from rigs.fake_hub import fetched
from rigs.hub_coders import AJT, D_IN, D_SAE, GEMMA, gemma, saelens

import sae
from sae.base.errors import DataError
from sae.loading import hub as hubs
from sae.loading.outline import coders_at, files_needed, outline
from sae.loading.remote import HubFiles
from sae.untrusted.hints import Hints


@pytest.mark.parametrize("address", [AJT, f"{GEMMA}/layer_3"])
def test_headers_tell_what_a_coder_is_before_its_weights_are_fetched(hub, address):
    _, asked = hub
    (place,) = coders_at(*hubs.locate(address), Hints())
    seen = outline(place)
    assert not any(name.endswith((".npz", ".safetensors")) for name in fetched(asked))
    coder = sae.load(address)
    assert seen.spec == coder.spec.with_(training=seen.spec.training)
    assert seen.why == ""
    assert seen.tensors["W_enc"] == ("float32", (D_IN, D_SAE))
    assert set(files_needed(seen)) == set(fetched(asked))
    again = outline(place)  # which is cached now, and read in earnest
    assert (again.spec, again.tensors, again.files) == (seen.spec, seen.tensors, seen.files)


def test_headers_of_an_archive_come_by_a_few_requests_for_its_parts(hub):
    root, asked = hub
    gemma(root, layer=9, l0=7, width=50_000)
    name = "layer_9/width_16k/average_l0_7/params.npz"
    files = HubFiles(GEMMA)
    header = files.header(name)
    path = root / "models" / GEMMA / name
    with np.load(path) as arrays:
        assert header == {key: (array.dtype.name, array.shape) for key, array in arrays.items()}
    parts = [request.rpartition("bytes=")[2].split("-") for request in asked if "bytes=" in request]
    assert 0 < sum(int(last) - int(first) + 1 for first, last in parts) < path.stat().st_size / 4
    before = len(asked)
    assert files.header(name) is header
    assert len(asked) == before


def test_a_file_without_a_header_is_not_fetched_to_be_looked_at(hub):
    root, asked = hub
    folder = root / "models" / "own" / "pickled"
    folder.mkdir(parents=True)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "x"}}))
    files = HubFiles("own/pickled")
    (place,) = coders_at(files, "", Hints())
    seen = outline(place)
    assert seen.spec is None
    assert "would have to be fetched" in seen.why
    assert "ae.pt" not in fetched(asked)
    assert files_needed(seen) == ["ae.pt", "config.json"]


def test_a_number_among_the_weights_is_not_guessed(hub):
    root, _ = hub
    folder = saelens(root, "own/cut", architecture="batchtopk", k=4)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({**tensors, "topk_threshold": torch.tensor(0.5)}, folder / "sae_weights.safetensors")
    (place,) = coders_at(HubFiles("own/cut"), "", Hints())
    seen = outline(place)
    assert (seen.spec, seen.format) == (None, "saelens")
    assert seen.why == "topk_threshold in hf://own/cut/sae_weights.safetensors would have to be fetched"
    assert seen.tensors["topk_threshold"] == ("float32", ())
    sae.load("own/cut")
    assert outline(place).spec is not None


def test_what_must_be_said_is_asked_for_before_anything_is_fetched(hub):
    root, asked = hub
    saelens(root, "own/scaled", normalize_activations="expected_average_only_in")
    (place,) = coders_at(HubFiles("own/scaled"), "", Hints())
    assert "scale: hf://own/scaled/sae_weights.safetensors does not say it" in outline(place).why
    assert fetched(asked) == ["cfg.json"]
    (place,) = coders_at(HubFiles("own/scaled"), "", Hints(scale=2.0))
    assert outline(place).spec.normalization.scale == 2


def test_a_tensor_that_does_not_belong_is_told_by_the_header_alone(hub):
    root, asked = hub
    saelens(root, "own/wrong", d_sae=D_SAE + 1)
    (place,) = coders_at(HubFiles("own/wrong"), "", Hints())
    with pytest.raises(DataError, match=r"tensor W_\w+ has shape \(\d+, \d+\), expected"):
        outline(place)
    assert fetched(asked) == ["cfg.json"]
