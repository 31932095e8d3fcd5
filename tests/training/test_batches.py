"""What coders are given of a batch that all of a run share."""

import pytest
import torch
from rigs.waiting import waits

from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection.topk import TopK
from sae.stream.batch import ActivationBatch
from sae.stream.carrying import Carrier
from sae.training.batches import Shares
from sae.training.config import CoderConfig
from sae.training.optim import OptimConfig
from sae.training.planning import CoderPlan
from sae.training.preparing import Setting

SITES = (Site("a", width=4),)


@pytest.mark.parametrize("limit", [None, 3.0])
def test_outliers_are_left_out_and_without_a_limit_nothing_is_brought_from_the_device(limit, monkeypatch):
    x = torch.arange(24.0).view(6, 4) / 10
    mask = MaskSpec(norm_limits={"a": limit} if limit else {})
    coder = SparseCoder(CoderSpec(4, 4, 8, TopK(2), SITES, SITES, mask=mask))
    batch = ActivationBatch({"a": x}, {}, torch.zeros(6, dtype=torch.long))
    shares = Shares(batch, object.__new__(Setting), Carrier(torch.device("cpu")))  # it is asked for passes alone
    with waits(monkeypatch) as found:
        got = shares.of(CoderPlan("a", SITES, SITES, CoderConfig(), OptimConfig()), coder)
    assert torch.equal(got.x, x if limit is None else x[x.norm(dim=1) <= limit])
    assert ("Tensor.cpu" in found) == (limit is not None)
