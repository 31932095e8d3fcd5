"""Batches of whole rows: ranks share those of one, whatever their number."""

import pytest
import torch
from rigs.fakes import Rows, tiny_lm

from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.parallel.ranks import Share
from sae.stream.rows import RowStream
from sae.stream.sources import Reading

ROWS, CONTEXT, PER_BATCH = 11, 4, 7


@pytest.fixture(scope="module")
def reading():
    return Reading(tiny_lm(), [Site("model.layers.1")], MaskSpec())


def taken(reading, share, state=None):
    rows = Rows(torch.arange(3, 3 + ROWS * CONTEXT).view(ROWS, CONTEXT).int())
    stream = RowStream(reading, rows, PER_BATCH * CONTEXT, 0, share)
    if state:
        stream.load_state(state)
    return [next(stream).text.tokens.tolist() for _ in range(4)], stream.state()


@pytest.mark.parametrize("world", [2, 3, 5, 7])
def test_ranks_share_the_rows_of_one(reading, world):
    alone, _ = taken(reading, Share())
    parts, states = zip(*(taken(reading, Share(rank, world)) for rank in range(world)), strict=True)
    assert [[row for part in batch for row in part] for batch in zip(*parts, strict=True)] == alone
    assert sum(int(state["batch"]) for state in states) == 4, "what a checkpoint sums up"
    later, _ = taken(reading, Share(), {"batch": torch.tensor(2)})
    assert later[:2] == alone[2:]
