"""What every function of a kernel path promises, as tests against plain definitions in float64.

A file of tests takes them over by name and says, as fixtures, which `path` (a module), on which `device`, and whether
sizes are `large`.
"""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.kernels.update import Update

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOW = (torch.float32, torch.float16, torch.bfloat16)


def near(found: Tensor, right: Tensor, within: float = 2e-6) -> None:
    """Fails unless the largest difference is such a share of the largest number: what sums in float32 leave."""
    assert found.shape == right.shape
    apart = (found.double() - right.double()).abs().max() if right.numel() else 0
    assert apart <= within * max(1e-30, float(right.abs().max()) if right.numel() else 0), float(apart)


def drawn(*shape: int, device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def codes(n: int, m: int, device: str, share: float, seed: int = 0) -> SimpleNamespace:
    """Returns codes of empty rows and a full one, of latents that never fire and one that fires where any does."""
    mask = torch.rand(n, m, generator=torch.Generator(device).manual_seed(seed), device=device) < share
    mask[:, m // 3] = True
    mask[1::3], mask[:1] = False, True
    mask[:, m // 2 :: 3] = False
    offsets = torch.cat([torch.zeros(1, dtype=torch.long, device=device), mask.sum(1).cumsum(0)])
    tokens, ids = mask.nonzero().T.contiguous()
    values = drawn(len(ids), device=device, seed=seed + 1)
    return SimpleNamespace(n=n, m=m, mask=mask, offsets=offsets, ids=ids, tokens=tokens, values=values)


def rows_of(kept: SimpleNamespace, coefficients: Tensor, rows: Tensor, to: str) -> Tensor:
    """Returns sums of coefficients times rows of the decoder "by token", or of the batch "by latent", in float64."""
    dense = torch.zeros(kept.n, kept.m, dtype=torch.float64, device=rows.device)
    dense[kept.tokens, kept.ids] = coefficients.double()
    return (dense if to == "by token" else dense.T) @ rows.double()


def products_of(kept: SimpleNamespace, rows: Tensor, weight: Tensor) -> Tensor:
    return (rows.double() @ weight.double().T)[kept.mask]


def shapes(large: bool) -> list[tuple[int, int, int, float]]:
    """Returns (tokens, latents, columns, share of entries)."""
    if large:
        return [(4096, 16_384, 1024, 2e-3), (3001, 5003, 777, 1e-2), (512, 4096, 4096, 1e-2)]
    return [(7, 30, 20, 0.3), (4, 11, 7, 0.5), (3, 8, 130, 0.4)]


# ---- top_ids


def firsts(scores: Tensor, k: int) -> Tensor:
    """Returns what a stable sort puts first; torch's takes NaN for the largest."""
    return scores.double().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", ["untied", "tied", "alike"])
def test_top_ids_equal_a_stable_sort(path, device, large, dtype, kind):
    n, sizes = (64, [(131_072, 64), (24_576, 300), (1_000_003, 32)]) if large else (2, [(300, 4), (1000, 16)])
    for m, k in [*sizes, (100, 7), (33, 1), (64, 64), (5, 4)]:
        scores = drawn(n, m, device=device, seed=m, dtype=dtype)
        if kind != "untied":
            scores = (scores * 4).round() / 4 if kind == "tied" else torch.zeros_like(scores)
        found = path.top_ids(scores, k)
        assert found.dtype == torch.long
        assert torch.equal(found, firsts(scores, k)), (m, k)


def test_top_ids_of_what_is_not_finite_of_both_zeros_and_of_rows_that_lie_apart(path, device):
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[nan, -0.0, 0.0, 1.0, -inf], [2, inf, 2, 2, nan], [-0.0, 0, -0.0, -1, -inf]], device=device)
    for k in range(1, 6):
        assert torch.equal(path.top_ids(scores, k), firsts(scores, k))
    wide = drawn(6, 500, device=device)
    assert torch.equal(path.top_ids(wide[:, 17:402], 9), firsts(wide[:, 17:402], 9))
    assert path.top_ids(wide[:0], 3).shape == (0, 3)
    assert path.top_ids(wide, 0).shape == (6, 0)


# ---- above


@pytest.mark.parametrize("one", [True, False])
def test_above_lists_what_is_above_its_cut_and_tells_of_more_than_there_is_room_for(path, device, large, one):
    n, m = (300, 70_001) if large else (5, 2100)
    scores = drawn(n, m + 3, device=device)[:, 3:]
    scores[0, 3] = float("nan")
    cuts = drawn(1 if one else m, device=device, seed=1).abs() + 0.5
    scores[1, 7], scores[1, 8] = cuts[-1 if one else 7], float("inf")  # equal is not above
    right = (scores > cuts) | scores.isnan()
    at = right.reshape(-1).nonzero()[:, 0]
    for capacity in (0, 10, len(at), len(at) + 50):
        counts, places, count = path.above(scores, cuts, capacity)
        assert int(count) == len(at)
        rows = torch.div(at[:capacity], m, rounding_mode="floor")
        assert torch.equal(counts, torch.bincount(rows, minlength=n)), "those that are returned"
        assert torch.equal(places[: len(at)], at[:capacity])
        assert (places[len(at) :] == -1).all()
    counts, places, count = path.above(scores[:0], cuts, 2)
    assert (len(counts), places.tolist(), int(count)) == (0, [-1, -1], 0)


# ---- products


@pytest.mark.parametrize("dtype", LOW)
def test_decode_errors_and_products(path, device, large, dtype):
    for n, m, d, share in shapes(large):
        kept = codes(n, m, device, share)
        weight, x = drawn(m, d, device=device, seed=2, dtype=dtype), drawn(n, d, device=device, seed=3, dtype=dtype)
        decoded = rows_of(kept, kept.values, weight, "by token")
        near(path.decode(kept.values, weight, kept.offsets, kept.ids), decoded)
        near(path.products(kept.offsets, kept.ids, x, weight), products_of(kept, x, weight))
        for rest in (drawn(d, device=device, seed=4), drawn(n, d, device=device, seed=5)):
            error, products = path.errors(kept.values, weight, kept.offsets, kept.ids, rest, x)
            right = x.double() - rest.double() - decoded
            near(error, right)
            near(products, products_of(kept, right, weight))


def test_rows_wider_than_one_program_holds(path, device):
    n, m, d = 2, 5, 8200
    kept, rest = codes(n, m, device, 0.6), drawn(d, device=device, seed=4)
    weight, x = drawn(m, d, device=device, seed=2), drawn(n, d, device=device, seed=3)
    error, products = path.errors(kept.values, weight, kept.offsets, kept.ids, rest, x)
    near(error, x.double() - rest - rows_of(kept, kept.values, weight, "by token"))
    near(products, products_of(kept, error, weight))
    weights = stepped(path, device, d=d, m=m, unit=True)
    near(torch.linalg.vector_norm(weights, dim=1), torch.ones(m))
    touched, one = torch.arange(m, device=device) == 2, torch.tensor(1.0, device=device)
    state = [weight.clone(), *(torch.ones_like(weight) for _ in range(3))]
    path.adam(*state, Update(1e-2, *CONSTANTS, one, one, one > 0), unit=True, touched=touched)
    assert torch.equal(state[0][~touched], weight[~touched])
    near(torch.linalg.vector_norm(state[0][2]), one)


def test_rows_that_are_one_or_lie_apart(path, device):
    kept, d = codes(6, 9, device, 0.4), 5
    weight, x = drawn(9, d, device=device), drawn(d, 6, device=device).T
    decoded = rows_of(kept, kept.values, weight, "by token")
    for rest in (drawn(d, device=device).expand(6, d), drawn(d, 6, device=device).T):
        error, _ = path.errors(kept.values, weight, kept.offsets, kept.ids, rest, x)
        near(error, x.double() - rest - decoded)
    near(path.products(kept.offsets, kept.ids, x, weight), products_of(kept, x, weight))
    out = torch.empty(9, d, device=device)
    path.weight_gradient(path.by_latent(kept.offsets, kept.ids, 9), kept.values, x, out)
    near(out, rows_of(kept, kept.values, x, "by latent"))
    scores, cut = drawn(3, 9, device=device), torch.full((1,), 0.5, device=device)
    alike = zip(path.above(scores, cut, 9), path.above(scores, cut.expand(9), 9), strict=True)
    assert all(torch.equal(one, other) for one, other in alike)


def test_no_tokens_and_no_entries(path, device):
    weight, rest = drawn(9, 6, device=device), drawn(6, device=device)
    for n in (0, 3):
        offsets, ids = (
            torch.zeros(n + 1, dtype=torch.long, device=device),
            torch.zeros(0, dtype=torch.long, device=device),
        )
        values, x = drawn(0, device=device), drawn(n, 6, device=device)
        assert path.decode(values, weight, offsets, ids).tolist() == torch.zeros(n, 6).tolist()
        error, products = path.errors(values, weight, offsets, ids, rest, x)
        assert torch.equal(error, x - rest)
        assert len(products) == len(path.products(offsets, ids, x, weight)) == 0
        out = torch.full((9, 6), 7.0, device=device)
        by = path.by_latent(offsets, ids, 9)
        assert by.starts.tolist() == [0] * 10
        assert float(path.weight_gradient(by, values, x, out)) == float(out.abs().sum()) == 0


# ---- gradients of weights


def test_entries_by_latent_keep_their_order(path, device, large):
    for n, m, _, share in shapes(large):
        kept = codes(n, m, device, share)
        by = path.by_latent(kept.offsets, kept.ids, m)
        order = kept.ids.argsort(stable=True)
        assert torch.equal(by.order.long(), order)
        assert torch.equal(by.tokens.long(), kept.tokens[order])
        assert torch.equal(by.starts.diff(), kept.mask.sum(0))
        assert by.starts.dtype == torch.long


@pytest.mark.parametrize("dtype", LOW)
def test_gradients_of_weights_and_their_squares(path, device, large, dtype):
    for n, m, d, share in shapes(large):
        kept = codes(n, m, device, share)
        x = drawn(n, d, device=device, seed=3, dtype=dtype)
        by, right = path.by_latent(kept.offsets, kept.ids, m), rows_of(kept, kept.values, x, "by latent")
        out = torch.full((m, d), 7.0, device=device)
        squares = path.weight_gradient(by, kept.values, x, out)
        near(out, right)
        near(squares, right.square().sum(), 1e-5)
        again = torch.full((m, d), 8.0, device=device)
        assert torch.equal(path.weight_gradient(by, kept.values, x, again), squares)
        assert torch.equal(again, out)


# ---- the update

CONSTANTS = BETA1, BETA2, EPS = 0.9, 0.999, 1e-6
"""With a smaller eps the update of what is nearly 0 would be that of its rounding."""


def stepped(path: Any, device: str, *, d: int, m: int, unit: bool, steps: int = 3) -> Tensor:
    """Checks some updates of a matrix, projected if `unit`, against torch's Adam in float64; returns the weights."""
    weight = drawn(m, d, device=device)
    weight /= torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    exact = weight.double().clone().requires_grad_()
    optimizer = torch.optim.Adam([exact], lr=1e-2, betas=(BETA1, BETA2), eps=EPS)
    half = torch.zeros(m, d, dtype=torch.bfloat16, device=device) if unit else None
    for step in range(1, steps + 1):
        gradient = drawn(m, d, device=device, seed=step) * 1e-3
        scale, number = torch.tensor(0.3, device=device), torch.tensor(float(step), device=device)
        before = [tensor.clone() for tensor in (weight, mean, square)]
        along = (gradient * weight).sum(1) / weight.square().sum(1) if unit else None
        for applies in (False, True):
            update = Update(1e-2, *CONSTANTS, number, scale, torch.tensor(applies, device=device))
            path.adam(weight, gradient.clone(), mean, square, update, along=along, unit=unit, half=half)
            if not applies:
                assert all(map(torch.equal, (weight, mean, square), before))
                assert half is None or step > 1 or not half.any()
        exact.grad = gradient.double() * 0.3
        if unit:
            shares = (exact.grad * exact).sum(1, keepdim=True) / exact.square().sum(1, keepdim=True)
            exact.grad -= (shares * exact).detach()
        optimizer.step()
        with torch.no_grad():
            if unit:
                exact /= torch.linalg.vector_norm(exact, dim=1, keepdim=True).clamp_min(1e-30)
        near(weight, exact.detach(), 1e-5)
        near(mean, optimizer.state[exact]["exp_avg"], 1e-5)
        near(square, optimizer.state[exact]["exp_avg_sq"], 1e-5)
        if half is not None:
            near(half / weight, torch.ones_like(weight), 2**-7)  # Triton's interpreter cuts the bits off
            assert INTERPRETED or torch.equal(half, weight.bfloat16())
    return weight


@pytest.mark.parametrize("unit", [True, False])
def test_updates_are_those_of_adam_with_clipping_projection_and_norms(path, device, large, unit):
    for _, m, d, _ in shapes(large):
        stepped(path, device, d=d, m=m, unit=unit)


@pytest.mark.parametrize("shape", [(30, 20), (7, 1), (33,)])
def test_rows_that_are_not_touched_stay_and_the_others_are_updated_as_if_alone(path, device, shape):
    weight, gradient = drawn(*shape, device=device, seed=1), drawn(*shape, device=device, seed=2)
    state = [weight, gradient, drawn(*shape, device=device, seed=3), drawn(*shape, device=device, seed=4).square()]
    matrix = len(shape) == 2
    options = {"along": drawn(shape[0], device=device, seed=5), "unit": True} if matrix else {}
    copies = [torch.zeros(shape, dtype=torch.bfloat16, device=device) if matrix else None for _ in range(2)]
    one, touched = torch.tensor(1.0, device=device), torch.arange(shape[0], device=device) % 3 == 1
    found, right = ([tensor.clone() for tensor in state] for _ in range(2))
    for applies in (False, True):
        update = Update(1e-2, *CONSTANTS, 5 * one, 0.3 * one, torch.tensor(applies, device=device))
        path.adam(*found, update, **options, half=copies[0], touched=touched)
        if not applies:
            assert all(map(torch.equal, (found[0], *found[2:]), (state[0], *state[2:])))
    path.adam(*right, update, **options, half=copies[1])
    for now, changed, before in zip(found, right, state, strict=True):
        if now is not found[1]:  # the gradient may be overwritten
            assert torch.equal(now[~touched], before[~touched])
            near(now[touched], changed[touched])
    if matrix:
        assert not copies[0][~touched].any()
        assert torch.equal(copies[0][touched], copies[1][touched])


def test_an_update_of_biases_and_of_rows_of_zeros(path, device):
    tensors = [torch.zeros(1500, device=device) for _ in range(4)]
    tensors[1][3] = 1e-3
    one = torch.tensor(1.0, device=device)
    update = Update(0.5, *CONSTANTS, one, one, one > 0)
    path.adam(*tensors, update)
    assert abs(float(tensors[0][3]) + 0.5) < 1e-3  # the first update is the rate, whatever the gradient
    assert int(tensors[0].count_nonzero()) == 1
    rows = [torch.zeros(3, 5, device=device) for _ in range(4)]
    path.adam(*rows, update, unit=True)
    assert float(rows[0].abs().sum()) == 0
