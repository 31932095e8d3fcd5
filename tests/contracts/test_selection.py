"""Every selection rule keeps the contract; a new rule is tested by being there."""

from itertools import pairwise

import pytest
import torch

from sae import plugins
from sae.coder import SparseCoder, initialize
from sae.errors import ConfigError
from sae.selection import Selection
from sae.selection.topk import TopK, top_ids
from sae.spec import CoderSpec

RULES = plugins.names(Selection)


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]()


def made(rule, d=16, m=256):
    coder = SparseCoder(CoderSpec(d, d, m, rule))
    initialize(coder, torch.zeros(d), 0)
    return coder


def test_support_is_well_formed(rule):
    offsets, ids = rule.support(torch.randn(12, 256))
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    assert (offsets.diff() >= 0).all()
    for start, stop in pairwise(offsets):
        assert (ids[start:stop].diff() > 0).all(), "ids ascend within a row, none twice"


def test_support_contains_the_nonzeros_and_sparse_equals_dense_decode(rule):
    coder, x = made(rule), torch.randn(20, 16)
    z = coder.encode(x)
    torch.testing.assert_close(coder.decode(z), z.to_dense() @ coder.W_dec + coder.b_dec)


def test_choice_depends_on_the_token_alone_at_inference(rule):
    coder, x = made(rule), torch.randn(20, 16)
    together = coder.encode(x).to_dense()
    alone = torch.stack([coder.encode(row).to_dense() for row in x])
    torch.testing.assert_close(together, alone)


def test_config_survives_the_spec(rule):
    spec = CoderSpec(4, 4, 256, rule)
    assert CoderSpec.from_json(spec.to_json()).selection == rule


def test_ties_go_to_the_lower_id(rule):
    first, second = rule.support(torch.zeros(3, 256)), rule.support(torch.zeros(3, 256))
    assert torch.equal(first[1], second[1])
    if isinstance(rule, TopK):
        assert torch.equal(first[1], torch.arange(rule.k).repeat(3))


@pytest.mark.parametrize(("m", "k"), [(256, 4), (4096, 32), (100, 7), (64, 64), (33, 1)])
def test_top_ids_equal_a_stable_sort(m, k):
    scores = torch.randint(0, 50, (40, m)).float()  # many ties
    expected = (-scores).sort(dim=1, stable=True).indices[:, :k].sort(dim=1).values
    assert torch.equal(top_ids(scores, k), expected)
    scores = torch.randn(40, m)
    assert torch.equal(top_ids(scores, k), scores.topk(k, dim=1).indices.sort(dim=1).values)


@pytest.mark.parametrize("k", [0, -1, 9])
def test_k_outside_the_width_is_refused(k):
    with pytest.raises(ConfigError, match=rf"selection\.k: {k} is not between 1 and d_sae = 8"):
        TopK(k).validate(8)


def test_ties_beside_nan_still_give_k_entries():
    """The loss reports what is not finite; choosing must not fail before it."""
    scores = torch.tensor([[float("nan"), 1.0, 1.0, 1.0, 0.0], [2.0, float("inf"), 2.0, 2.0, float("nan")]])
    assert top_ids(scores, 2).tolist() == [[0, 1], [1, 4]]
    assert top_ids(scores, 3).tolist() == [[0, 1, 2], [0, 1, 4]]
