"""The exact top-k's against stable sorts in float64, ties included."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.kernels.codes import Entries
from sae.kernels.largest import by_rank, kept_of_parts, ranks, reached, top_entries, top_ids, top_of, top_of_columns


def tied(n, m, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-20, 20, (n, m), generator=draw).float() / 4


def untied(n, m, seed=0):
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed))


def mask_of(entries: Entries, n, m):
    mask = torch.zeros(n, m, dtype=torch.bool)
    mask[entries.tokens, entries.ids] = True
    assert int(mask.sum()) == len(entries.ids), "none twice"
    return mask


def brute_force(scores, count):
    """The k largest of the flattened matrix by a stable argsort in float64."""
    order = np.argsort(-scores.double().numpy().reshape(-1), kind="stable")[:count]
    mask = np.zeros(scores.numel(), dtype=bool)
    mask[order] = True
    return torch.from_numpy(mask.reshape(scores.shape))


@pytest.mark.parametrize(("m", "k"), [(256, 4), (4096, 32), (100, 7), (64, 64), (33, 1)])
def test_rows_equal_a_stable_sort(m, k):
    for scores in (tied(40, m), untied(40, m)):
        expected = (-scores.double()).sort(dim=1, stable=True).indices[:, :k].sort(dim=1).values
        assert torch.equal(top_ids(scores, k), expected)


def test_ties_beside_nan_still_give_k_entries():
    """The loss reports what is not finite; choosing must not fail before it."""
    scores = torch.tensor([[float("nan"), 1.0, 1.0, 1.0, 0.0], [2.0, float("inf"), 2.0, 2.0, float("nan")]])
    assert top_ids(scores, 2).tolist() == [[0, 1], [1, 4]]
    assert top_ids(scores, 3).tolist() == [[0, 1, 2], [0, 1, 4]]
    assert top_ids(torch.full((1, 40), torch.nan), 3).tolist() == [[0, 1, 2]], "one NaN is as large as another"


def parts_of(scores, sizes, k):
    """The largest of each part in the order (value falling, id rising), filled up with -inf, as ranks gather them."""
    c, rows = min(k, max(sizes)), []
    for part in scores.split(sizes, dim=1):
        order = part.argsort(dim=1, descending=True, stable=True)[:, :c]
        rows.append(torch.nn.functional.pad(part.gather(1, order), (0, c - order.shape[1]), value=-torch.inf))
    return torch.stack(rows)


VALUES = {
    "few values": st.sampled_from([-1.0, -0.0, 0.0, 0.5]),
    "all equal": st.just(0.0),
    "beside NaN": st.sampled_from([float("nan"), float("inf"), 1.0, 0.0]),
    "untied": st.floats(-4, 4, width=32),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_parts_keep_what_the_whole_row_would(values, data):
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any))
    n, m = data.draw(st.integers(0, 3)), sum(sizes)
    drawn = data.draw(st.lists(values, min_size=n * m, max_size=n * m))
    scores, k = torch.tensor(drawn, dtype=torch.float32).view(n, m), data.draw(st.integers(1, m))
    kept = torch.zeros(n, m, dtype=torch.bool).scatter_(1, top_ids(scores, k), True)
    expected = torch.stack([part.sum(1) for part in kept.split(sizes, dim=1)])
    assert torch.equal(kept_of_parts(parts_of(scores, sizes, k), k), expected)


def test_what_fills_up_a_part_is_kept_nowhere():
    values = torch.tensor([[[1.0, -torch.inf]], [[-torch.inf, -torch.inf]], [[3.0, 1.0]]])
    assert [kept_of_parts(values, k).T.tolist() for k in (1, 2, 9)] == [[[0, 0, 1]], [[1, 0, 1]], [[1, 0, 2]]]


@pytest.mark.parametrize("count", [0, 1, 5, 100, 3000, 64 * 100, 10**6])
@pytest.mark.parametrize("make", [tied, untied])
def test_the_whole_matrix_equals_brute_force(make, count):
    scores = make(64, 100)
    found = top_entries(scores, count, first_token=5)
    assert torch.equal(mask_of(Entries(found.tokens - 5, found.ids, found.values), 64, 100), brute_force(scores, count))
    assert torch.equal(found.values, scores[found.tokens - 5, found.ids])
    again = top_of(Entries(found.tokens, found.ids, found.values), count // 2)
    assert torch.equal(
        mask_of(Entries(again.tokens - 5, again.ids, again.values), 64, 100), brute_force(scores, count // 2)
    )


def test_a_sample_that_misleads_costs_time_only():
    """Every 64th entry is looked at first; here these are the largest, and here they are the smallest."""
    for sign in (1, -1):
        scores = untied(64, 64)
        scores[:, 0] = sign * 100 + scores[:, 0]
        assert torch.equal(mask_of(top_entries(scores, 500), 64, 64), brute_force(scores, 500))


@pytest.mark.parametrize("make", [tied, untied])
def test_columns_equal_brute_force_with_any_budgets(make):
    scores = make(50, 40)
    budgets = torch.randint(0, 60, (40,), generator=torch.Generator().manual_seed(1))
    budgets[:3] = torch.tensor([0, 1, 50])
    mask = mask_of(top_of_columns(scores, budgets), 50, 40)
    for column in range(40):
        expected = brute_force(scores[:, column : column + 1], min(50, int(budgets[column])))[:, 0]
        assert torch.equal(mask[:, column], expected), column
    assert torch.equal(mask.sum(0), budgets.clamp_max(50))


@pytest.mark.parametrize("make", [tied, untied])
@pytest.mark.parametrize("n", [1, 50, 300, 1100])
def test_as_many_entries_of_a_column_reach_a_number_and_hardly_more(make, n):
    scores, m = make(n, 90), 90
    counts = (n * torch.rand(m, generator=torch.Generator().manual_seed(1)) ** 4).long() + 1
    counts[:2] = torch.tensor([n, n + 1])
    found = reached(scores, counts, int(counts.sum()))
    assert found.isinf().tolist() == [column == 1 for column in range(m)], "only there are fewer"
    above = (scores >= found).sum(0)[2:]
    assert (above >= counts[2:]).all()
    ties = 0 if make is untied else n / 10
    assert (above <= 1.5 * counts[2:] + 5 + ties).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_order_of_bits_is_that_of_numbers(dtype):
    values = torch.tensor(
        [0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf, torch.nan, -1e-30, 1e-30, -2.0, 7.0], dtype=dtype
    )
    ids = torch.tensor([0] * 10 + [2])
    order, starts = by_rank(Entries(torch.arange(11), ids, values), 4)
    assert order.tolist() == [6, 4, 2, 8, 0, 1, 7, 3, 9, 5, 10]
    assert starts.tolist() == [0, 10, 10, 11, 11]


def test_ranks_within_latents():
    entries = Entries(torch.tensor([0, 1, 2, 2, 3]), torch.tensor([1, 1, 1, 0, 1]), torch.tensor([1.0, 3, 1, 9, 2]))
    assert ranks(*by_rank(entries, 2)).tolist() == [2, 0, 3, 0, 1]


def test_entries_become_a_support():
    entries = Entries(torch.tensor([2, 0, 2]), torch.tensor([1, 5, 0]), torch.zeros(3))
    offsets, ids = entries.to_support(4)
    assert offsets.tolist() == [0, 1, 1, 3, 3]
    assert ids.tolist() == [5, 0, 1]
