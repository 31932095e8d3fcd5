"""Coders on the hub: addresses, what is fetched of a repository and what is not, headers, listings that are kept."""

import pytest
import torch
from rigs.fake_hub import COMMIT, fetched
from rigs.hub_coders import AJT, GEMMA, native

import sae
from sae.base.errors import ConfigError
from sae.loading.remote import HubFiles


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
