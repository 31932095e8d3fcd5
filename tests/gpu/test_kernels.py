"""The kernels on a card: each against its definition, at larger sizes, and where offsets leave 31 bits."""

import pytest
import torch
from rigs.kernel_contract import *  # noqa: F403
from rigs.kernel_contract import drawn, firsts

from sae.kernels.update import Update

CARD = torch.cuda.is_available()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CARD, reason="there is no card that CUDA knows of")]


@pytest.fixture
def path():
    from sae.kernels import cuda

    return cuda


@pytest.fixture
def device():
    return "cuda"


@pytest.fixture
def large():
    return True


def room(bytes_needed: float) -> None:
    """Skips what the card has no memory for."""
    if torch.cuda.mem_get_info()[0] < bytes_needed:
        pytest.skip(f"the card has less than {bytes_needed / 1e9:.0f} GB free")


def test_scores_of_more_than_2_to_the_31_entries(path, device):
    room(14e9)
    n, m = 18_000, 131_072
    scores = drawn(1, m, device=device, dtype=torch.bfloat16).expand(n, m).contiguous()
    scores[-1] = drawn(m, device=device, seed=1)
    found = path.top_ids(scores, 64)
    assert torch.equal(found[:1].expand(n - 1, 64), found[:-1])
    assert torch.equal(found[[0, -1]], firsts(scores[[0, -1]], 64))
    counts, places, count = path.above(scores, torch.full((1,), 4.0, device=device), 2_000_000)
    assert torch.equal(counts, (scores > 4).sum(1))
    last = places[int(count - counts[-1]) : int(count)]
    assert torch.equal(last - (n - 1) * m, (scores[-1] > 4).nonzero()[:, 0])


def test_weights_of_more_than_2_to_the_31_entries(path, device):
    room(60e9)
    m, d = 600_000, 4096
    weight = torch.zeros(m, d, device=device)
    ids = torch.tensor([0, 1, m - 2, m - 1], device=device)
    weight[ids] = drawn(4, d, device=device)
    offsets, values, x = torch.tensor([0, 4], device=device), drawn(4, device=device), drawn(1, d, device=device)
    torch.testing.assert_close(
        path.decode(values, weight, offsets, ids), values[None] @ weight[ids], rtol=1e-4, atol=1e-4
    )
    found = path.products(offsets, ids, x, weight)
    torch.testing.assert_close(found, (weight[ids].double() @ x[0].double()).float(), rtol=1e-4, atol=1e-4)
    gradient = torch.full((m, d), 7.0, device=device)
    path.weight_gradient(path.by_latent(offsets, ids, m), values, x, gradient)
    torch.testing.assert_close(gradient[ids], values[:, None] * x)
    assert int(gradient.count_nonzero()) == 4 * d
    state = [torch.zeros(m, d, device=device) for _ in range(2)]
    one = torch.tensor(1.0, device=device)
    before = weight[ids].clone()
    path.adam(weight, gradient, *state, Update(0.1, 0.9, 0.999, 1e-8, one, one, one > 0))
    torch.testing.assert_close(weight[ids], before - 0.1 * gradient[ids].sign(), rtol=1e-4, atol=1e-4)
    assert int(weight.count_nonzero()) <= 4 * d


def test_the_same_bits_in_every_run(path, device):
    n, m, d = 4096, 16_384, 1024
    ids = path.top_ids(drawn(n, m, device=device), 32).reshape(-1)
    offsets = torch.arange(0, n * 32 + 1, 32, device=device)
    values, weight, x = drawn(len(ids), device=device), drawn(m, d, device=device), drawn(n, d, device=device)

    def once():
        error, products = path.errors(values, weight, offsets, ids, x[0], x)
        gradient = torch.empty(m, d, device=device)
        square = path.weight_gradient(path.by_latent(offsets, ids, m), products, error, gradient)
        return error, products, gradient, square

    first = once()
    for _ in range(5):
        assert all(map(torch.equal, first, once()))


def test_no_function_waits_for_the_card(path, device):
    n, m, d, k = 256, 4096, 256, 8
    scores, weight, x = drawn(n, m, device=device), drawn(m, d, device=device), drawn(n, d, device=device)
    offsets, one = torch.arange(0, n * k + 1, k, device=device), torch.tensor(1.0, device=device)
    cut, state = torch.full((1,), 2.0, device=device), [torch.zeros(m, d, device=device) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = path.top_ids(scores, k).reshape(-1)
        values = scores.gather(1, ids.view(n, k)).view(-1)
        path.above(scores, cut, 1000)
        error, products = path.errors(values, weight, offsets, ids, x[0], x)
        by, gradient = path.by_latent(offsets, ids, m), torch.empty(m, d, device=device)
        path.weight_gradient(by, products, error, gradient)
        path.decode(values, weight, offsets, ids)
        path.products(offsets, ids, x, weight)
        path.adam(weight, gradient, *state, Update(1.0, 0.9, 0.999, 1e-8, one, one, one > 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
