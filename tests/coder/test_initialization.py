"""A coder's start: drawn by blocks of rows, so that each rank draws what it holds, and all draw what one would."""

from dataclasses import replace

import pytest
import torch
from rigs.sharing import cases
from rigs.teams import pretended

import sae
from sae.base.errors import ConfigError
from sae.coder import initialization
from sae.coder.cutting import part_of
from sae.lm.masking import MaskSpec
from sae.parallel.mesh import Shape
from sae.parallel.ranks import ITSELF
from sae.training.beginning import Begun, new_part
from sae.training.measuring import Recipe, measure

CHOSEN = ["rule topk", "rule jumprelu", "rule gated", "encoder glu", "transcoder topk", "cross-layer topk"]


def begun(name, pre_bias):
    case = cases()[name]
    config = replace(case.config(), pre_bias=pre_bias)
    draw = torch.Generator().manual_seed(0)
    sites = {site.name: torch.randn(64, site.width, generator=draw) + 1 for site in (*case.reads, *case.writes)}
    found = measure(sites, case.reads, case.writes, MaskSpec(), Recipe(config.normalization, 10.0))
    return config, Begun.of(config, found)


@pytest.mark.parametrize("block", [2**14, 50])
@pytest.mark.parametrize("name", CHOSEN)
def test_a_shard_starts_as_those_rows_of_the_whole(name, block, monkeypatch):
    monkeypatch.setattr(initialization, "BLOCK", block)
    for pre_bias in ("none", "own", *(["decoder"] if "cross-layer" not in name else [])):
        config, start = begun(name, pre_bias)
        whole = new_part(config, start, ITSELF, "cpu")
        assert whole.W_enc.norm(dim=1).allclose(torch.ones(whole.d_sae))
        for n in (2, 5):
            for axis in (mesh.latents for mesh in pretended(Shape(latents=n))):
                own, wanted = new_part(config, start, axis, "cpu").state_dict(), part_of(whole, axis).state_dict()
                assert own.keys() == wanted.keys()
                for key, tensor in wanted.items():
                    assert torch.equal(own[key], tensor), (pre_bias, axis, key)


def test_blocks_are_drawn_apart_and_the_first_as_ever(monkeypatch):
    config, start = begun("rule topk", "none")
    whole = new_part(config, start, ITSELF, "cpu").W_enc
    assert torch.equal(whole, initialization._block(0, *whole.shape, config.seed))
    monkeypatch.setattr(initialization, "BLOCK", 64)
    by_blocks = new_part(config, start, ITSELF, "cpu").W_enc
    for number, rows in enumerate(by_blocks.split(64)):
        assert torch.equal(rows, initialization._block(number, *rows.shape, config.seed))
    assert len(by_blocks.unique(dim=0)) == len(whole)


def test_a_rank_draws_no_more_than_the_blocks_its_rows_lie_in(monkeypatch):
    drawn, original = [], initialization._block
    monkeypatch.setattr(initialization, "BLOCK", 32)
    monkeypatch.setattr(initialization, "_block", lambda *args: drawn.append(args[0]) or original(*args))
    config, start = begun("rule topk", "none")
    new_part(config, start, pretended(Shape(latents=4))[1].latents, "cpu")  # rows 47 to 94
    assert drawn == [1, 2]


@pytest.mark.parametrize("name", ["rule jumprelu", "rule feature_choice", "cross-layer topk"])
def test_a_shard_goes_on_from_its_rows_of_a_trained_coder(name, tmp_path):
    config, start = begun(name, "none")
    trained = new_part(replace(config, seed=5), start, ITSELF, "cpu")
    sae.save(trained, tmp_path)
    config = replace(config, start_from=str(tmp_path))
    for axis in (mesh.latents for mesh in pretended(Shape(latents=3))):
        own, wanted = new_part(config, start, axis, "cpu").state_dict(), part_of(trained, axis).state_dict()
        for key, tensor in wanted.items():
            assert torch.equal(own[key], tensor), key
            assert own[key].untyped_storage().nbytes() == tensor.nbytes, "it does not hold the file"


def test_another_coder_is_no_start_of_a_shard(tmp_path):
    config, start = begun("rule topk", "none")
    axis = pretended(Shape(latents=2))[1].latents
    trained = new_part(config, start, ITSELF, "cpu")
    sae.save(trained, tmp_path)
    started = replace(config, start_from=str(tmp_path))
    other = start._replace(spec=start.spec.with_(d_sae=100))
    with pytest.raises(ConfigError, match=r"coder\.start_from: .* has d_sae 190, but this run 100"):
        new_part(started, other, axis, "cpu")
