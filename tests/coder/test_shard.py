"""Shards: every parameter says over whom its gradient is summed; the k best of all shards are those of the whole."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs.sharing import cases
from rigs.teams import together

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.cutting import empty_part, part_of
from sae.coder.shard import SHARED, Shard, best
from sae.coder.spec import CoderSpec
from sae.kernels import top_ids
from sae.parallel.cut import Cut
from sae.parallel.mesh import Shape
from sae.parallel.ranks import Axis
from sae.selection.matching_pursuit import MatchingPursuit


def specs():
    """Returns the spec of every kind of coder there is, by name."""
    found = {}
    for name, case in cases().items():
        config = case.config()
        found[name] = config.spec(case.reads, case.writes, config.normalization)
    return found


@pytest.mark.parametrize("name", specs())
def test_every_parameter_is_of_latents_or_shared(name):
    """Those of latents have as many rows a latent in a shard as in the whole; the others every rank has whole."""
    spec = specs()[name]
    whole, shard = SparseCoder(spec, "meta"), Shard(spec, Axis(0, 2, "two"))  # type: ignore[arg-type]
    part = SparseCoder(shard.spec, "meta")
    for key, tensor in part.state_dict().items():
        rows, there = shard.rows(key), whole.state_dict()[key]
        assert (rows is None) == (key in SHARED)
        if rows is None:
            assert tensor.shape == there.shape
        else:
            assert (sum(map(len, rows.pieces)), rows.total) == (len(tensor), len(there))


@pytest.mark.parametrize("name", ["rule topk", "rule groupmax", "cross-layer topk", "fewer latents than ranks topk"])
def test_the_parts_of_a_coder_are_all_of_it(name):
    spec = specs()[name]
    whole = SparseCoder(spec).requires_grad_(False)
    for i, parameter in enumerate(whole.parameters()):
        parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + i)
    parts = [part_of(whole, Axis(rank, 4, "four")) for rank in range(4)]  # type: ignore[arg-type]
    for key, tensor in whole.state_dict().items():
        again = torch.full_like(tensor, -1)
        for part in parts:
            rows = part.shard.rows(key)
            if rows is None:
                again = part.state_dict()[key]
                continue
            pieces = part.state_dict()[key].split([len(piece) for piece in rows.pieces])
            for piece, values in zip(rows.pieces, pieces, strict=True):
                again[piece.start : piece.stop] = values
        assert torch.equal(again, tensor), key


@settings(max_examples=25)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.integers(1, 12), st.sampled_from([1, 2, 50]), st.data()
)
def test_the_k_best_of_all_ranks_are_those_of_the_whole(n, blocks, size, k, kinds, data):
    """Also where all are equal, where ranks hold no latent, and where k is more than one holds."""
    seed = data.draw(st.integers(0, 2**20))
    scores = torch.randint(0, kinds, (5, blocks * size), generator=torch.Generator().manual_seed(seed)).double()
    scores[0, ::3] = torch.nan
    k = min(k, blocks * size)
    wanted = top_ids(scores, k)

    def own(mesh):
        cut = Cut(size, blocks, mesh.latents)
        mine = cut.own(scores.T).T
        found = best(mine, mine, k, [slice(0, mine.shape[1])], [cut])
        return [sorted(cut.ids(ids[kept]).tolist()) for ids, kept in zip(found.ids, found.kept, strict=True)]

    every = together(Shape(latents=n), own)
    assert [sorted(chain(*rows)) for rows in zip(*every, strict=True)] == wanted.tolist()


def test_what_cannot_be_cut_is_refused_by_name():
    pursuit = CoderSpec(4, 4, 8, MatchingPursuit(), encoder="matching_pursuit")
    with pytest.raises(ConfigError, match=r"parallel\.latents: encoder matching_pursuit cannot choose over several"):
        empty_part(pursuit, Axis(0, 2, "two"))  # type: ignore[arg-type]
