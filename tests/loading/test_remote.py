"""Coders on the hub: addresses, what is fetched of a repository and what is not, headers, listings that are kept."""

import json

import numpy as np
import pytest
import torch
from rigs.fake_hub import COMMIT, Faults, fake_hub, reached_from_here
from rigs.hub_coders import D_IN, D_SAE, GEMMA, gemma, native, saelens

import sae
from sae.base.errors import ConfigError, DataError
from sae.loading import hub as hubs
from sae.loading.outline import coders_at, files_needed, outline
from sae.loading.remote import HubFiles
from sae.untrusted.hints import Hints

AJT = "neuronpedia/gpt2-small__res_sce-ajt/2-res_sce-ajt"


@pytest.fixture
def faults():
    return Faults()


@pytest.fixture
def hub(tmp_path, monkeypatch, faults):
    root = tmp_path / "hub"
    saelens(root, AJT)
    gemma(root)
    gemma(root, layer=4, l0=20)
    (root / "models" / GEMMA / "README.md").write_text("# Gemma Scope\n")
    with fake_hub(root, tmp_path / "home", faults) as (environment, asked):
        reached_from_here(monkeypatch, environment)
        yield root, asked


def fetched(asked):
    """The names of the files that were fetched whole."""
    gets = [request.split() for request in asked if request.startswith("GET") and "/resolve/" in request]
    return sorted({words[1].partition(f"/resolve/{COMMIT}/")[2] for words in gets if len(words) == 2})


@pytest.mark.parametrize(
    "address",
    [
        AJT,
        f"hf://{AJT}",
        f"{AJT}/sae_weights.safetensors",
        "gpt2-small-res_sce-ajt/blocks.2.hook_resid_pre",
        ("gpt2-small-res_sce-ajt", "blocks.2.hook_resid_pre"),
        "gpt2-small/2-res_sce-ajt",
        AJT.rpartition("/")[0],
    ],
)
def test_one_coder_by_any_of_its_addresses_fetches_what_it_needs_and_no_more(hub, address):
    root, asked = hub
    coder = sae.load(address)
    assert fetched(asked) == ["2-res_sce-ajt/cfg.json", "2-res_sce-ajt/sae_weights.safetensors"]
    assert torch.equal(coder.W_enc, sae.load(root / "models" / AJT).W_enc)
    assert coder.spec.training["released"] == {
        "format": "saelens",
        "file": "2-res_sce-ajt/sae_weights.safetensors",
        "from": "neuronpedia/gpt2-small__res_sce-ajt",
        "revision": COMMIT,
    }
    assert coder.spec.reads[0].model == "openai-community/gpt2"


def test_a_repository_of_several_names_them_and_load_all_loads_them(hub):
    _, asked = hub
    with pytest.raises(ConfigError, match=r"not one coder; it holds 2: layer_3/width_16k/average_l0_59/params\.npz"):
        sae.load(GEMMA)
    assert fetched(asked) == []
    found = sae.load_all(GEMMA)
    assert [*found] == ["layer_3/width_16k/average_l0_59", "layer_4/width_16k/average_l0_20"]
    assert [coder.spec.metrics["advertised"]["l0"] for coder in found.values()] == [59, 20]
    assert fetched(asked) == [f"{name}/params.npz" for name in found]
    assert [*sae.load_all(f"{GEMMA}/layer_4")] == ["width_16k/average_l0_20"]


def test_a_second_load_asks_for_the_listing_alone(hub):
    _, asked = hub
    sae.load(AJT)
    asked.clear()
    sae.load(AJT)
    assert [request.split()[1] for request in asked] == ["/api/models/neuronpedia/gpt2-small__res_sce-ajt"]
    asked.clear()
    sae.load(AJT, revision=COMMIT)  # what a commit holds does not change
    assert asked == []


def test_a_cache_folder_of_ones_own(hub, tmp_path):
    sae.load(AJT, cache_dir=tmp_path / "own")
    assert (tmp_path / "own" / "models--neuronpedia--gpt2-small__res_sce-ajt" / "refs" / "main").read_text() == COMMIT
    assert not (tmp_path / "home" / "hub").exists()


def test_names_below_that_are_not_there_name_the_nearest(hub):
    with pytest.raises(ConfigError, match=r"has no '2-res_sce-ajtt'\. Did you mean '2-res_sce-ajt'"):
        sae.load(f"{AJT}t")
    with pytest.raises(ConfigError, match=r"no hub repository 'google/gemma-scope-2b-pt-ress'.*Did you mean"):
        sae.load("google/gemma-scope-2b-pt-ress")
    with pytest.raises(
        ConfigError, match=r"hub repository 'gpt2-small-res-jbb/blocks.*Did you mean 'gpt2-small-res-jb'"
    ):
        sae.load("gpt2-small-res-jbb/blocks.8.hook_resid_pre")


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


def test_sizes_are_known_before_fetching(hub):
    root, _ = hub
    files = HubFiles(GEMMA)
    names = [name for name in files.names() if name.endswith(".npz")]
    wanted = {name: (root / "models" / GEMMA / name).stat().st_size for name in names}
    assert files.sizes(names) == wanted
    files.path(names[0])
    assert files.sizes(names) == wanted


def test_a_native_coder_comes_back_from_the_hub_as_it_was(hub):
    root, _ = hub
    folder = native(root / "models" / "own" / "native", metrics={"reconstruction": {"fvu": 0.25}})
    assert sae.load("own/native").spec == sae.load(folder).spec
    assert torch.equal(sae.load("own/native").W_dec, sae.load(folder).W_dec)
