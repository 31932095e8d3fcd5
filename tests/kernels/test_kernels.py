"""Every path against the definitions, gradients against finite differences, and what a step collects in a sink."""

import pytest
import torch

from sae import kernels
from sae.kernels import dense, dispatch, reference, segmented
from sae.kernels.update import Update

FORWARD = {"sparse": segmented, "dense": dense}


def random_support(n, m, most, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(m, generator=g)[: int(torch.randint(0, most + 1, (), generator=g))] for _ in range(n)]
    offsets = torch.tensor([0, *[len(r) for r in rows]]).cumsum(0)
    return offsets, torch.cat([r.sort().values for r in rows])


@pytest.fixture(params=["sparse", "dense"])
def way(request, monkeypatch):
    """Codes are multiplied so, whatever their density."""
    monkeypatch.setattr(dispatch, "DENSE_SHARE", 2.0 if request.param == "sparse" else -1.0)
    return FORWARD[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "most"), [(7, 11, 5), (1, 3, 3), (20, 64, 1), (9, 12, 12), (5, 4, 0)])
def test_every_product_equals_its_definition(way, n, m, most, dtype):
    offsets, ids = random_support(n, m, most)
    values, rows, weight = (torch.randn(s, dtype=dtype) for s in ((len(ids),), (n, 5), (m, 5)))
    rest, target = torch.randn(5, dtype=dtype), torch.randn(n, 5, dtype=dtype)
    for name, given in {
        "decode": (values, weight, offsets, ids),
        "products": (offsets, ids, rows, weight),
        "errors": (values, weight, offsets, ids, rest, target),
    }.items():
        torch.testing.assert_close(getattr(way, name)(*given), getattr(reference, name)(*given))
    by = segmented.by_latent(offsets, ids, m)
    for made, right in zip(by, reference.by_latent(offsets, ids, m), strict=True):
        assert torch.equal(made, right)
    out = [torch.full((m, 5), torch.nan, dtype=dtype) for _ in range(2)]
    squares = [path.weight_gradient(by, values, rows, o) for path, o in zip((segmented, reference), out, strict=True)]
    torch.testing.assert_close(*out)
    torch.testing.assert_close(*squares, rtol=1e-5, atol=1e-6)


def test_the_definitions_equal_dense_algebra():
    offsets, ids = random_support(9, 12, 6)
    values, weight, rows = torch.randn(len(ids)), torch.randn(12, 3), torch.randn(9, 3)
    full = torch.zeros(9, 12)
    for row in range(9):
        full[row, ids[offsets[row] : offsets[row + 1]]] = values[offsets[row] : offsets[row + 1]]
    torch.testing.assert_close(reference.decode(values, weight, offsets, ids), full @ weight)
    torch.testing.assert_close(reference.products(offsets, ids, rows, weight), (rows @ weight.T)[full != 0])
    out = torch.empty(12, 3)
    reference.weight_gradient(reference.by_latent(offsets, ids, 12), values, rows, out)
    torch.testing.assert_close(out, full.T @ rows)


@pytest.mark.parametrize("capacity", [0, 3, 30, 200])
def test_what_lies_above_comes_in_order_into_a_buffer_of_fixed_size(capacity):
    scores = torch.randn(11, 17)
    scores[2, 3], scores[4] = torch.nan, -9.0
    cuts = torch.linspace(-1, 1, 17)
    counts, places, count = reference.above(scores, cuts, capacity)
    expected = (~(scores <= cuts)).flatten().nonzero()[:, 0]
    assert places[: len(expected)].tolist() == expected[:capacity].tolist()
    assert (places[len(expected) :] == -1).all()
    assert int(counts.sum()) == min(capacity, len(expected))
    found = segmented.above(scores, cuts, capacity)
    assert torch.equal(found[0], counts)
    assert torch.equal(found[1], places)
    assert (int(found[2]) > capacity) == (int(count) > capacity)


@pytest.mark.parametrize("applies", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_updates_equal_their_definition_over_many_steps(applies, unit):
    rows = 2 * segmented.ROWS + 3
    start = torch.nn.functional.normalize(torch.randn(rows, 4), dim=1)
    held = [[start.clone(), torch.zeros(rows, 4), torch.zeros(rows, 4)] for _ in range(2)]
    for step in range(1, 6):
        gradient, applied = torch.randn(rows, 4), torch.tensor(applies or step % 2 == 0)
        for path, (weight, mean, square) in zip((segmented, reference), held, strict=True):
            update = Update(1e-2, 0.9, 0.999, 1e-8, torch.tensor(float(step)), torch.tensor(0.3), applied)
            along = (gradient * weight).sum(1) if unit else None
            path.adam(weight, gradient.clone(), mean, square, update, along=along, unit=unit)
    for mine, right in zip(*held, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(2 * segmented.ROWS + 3, 4), (40,)])
def test_rows_that_are_not_touched_stay_as_they_are(shape):
    matrix = len(shape) == 2
    start = [torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.rand(shape)]
    along, half = (torch.randn(shape[0]), torch.zeros(shape)) if matrix else (None, None)
    touched, one = torch.rand(shape[0]) < 0.3, torch.tensor(1.0)
    update = Update(1e-2, 0.9, 0.999, 1e-8, 4 * one, 0.3 * one, one > 0)
    found = []
    for path, rows in ((reference, None), (reference, touched), (segmented, touched)):
        tensors, copy = [tensor.clone() for tensor in start], None if half is None else half.clone()
        path.adam(*tensors, update, along=along, unit=matrix, half=copy, touched=rows)
        found.append([tensors[0], *tensors[2:], *([] if copy is None else [copy])])
    for every, right, mine, before in zip(*found, [start[0], *start[2:], *([half] if matrix else [])], strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)
        assert torch.equal(right[touched], every[touched])
        assert torch.equal(mine[~touched], before[~touched])


def test_low_precision_products(way):
    offsets, ids = random_support(9, 12, 6)
    y, weight = torch.randn(9, 8, dtype=torch.bfloat16), torch.randn(12, 8, dtype=torch.bfloat16)
    exact = reference.products(offsets, ids, y.double(), weight.double())
    torch.testing.assert_close(way.products(offsets, ids, y, weight).double(), exact, rtol=2e-2, atol=5e-2)


def doubles(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_gradients_equal_finite_differences(way):
    offsets, ids = random_support(5, 8, 4)
    y, w, b, v, rest = doubles((5, 3), (8, 3), (8,), (len(ids),), (3,))
    target = torch.randn(5, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y, w, b: kernels.encode_at(y, w, b, offsets, ids), (y, w, b))
    assert torch.autograd.gradcheck(lambda v, w: kernels.decode(v, w, offsets, ids), (v, w))
    for some in (slice(0, 1), slice(1, 2), slice(0, 2)):  # what is made, its squared error, both
        fit = lambda v, w, r, some=some: kernels.fit(v, w, r, target, offsets, ids)[some]  # noqa: E731
        assert torch.autograd.gradcheck(fit, (v, w, rest))


def test_given_scores_are_used_where_the_caller_has_them_and_pass_the_same_gradients(way):
    offsets, ids = random_support(6, 10, 5)
    leaves = [torch.randn(6, 4), torch.randn(10, 4), torch.randn(10)]
    known, weights = torch.randn(len(ids)), torch.randn(len(ids))
    grads = []
    for given in (known, None):
        parts = [leaf.clone().requires_grad_() for leaf in leaves]
        kept = kernels.encode_at(*parts, offsets, ids, given)
        assert given is None or torch.equal(kept, given)
        (kept * weights).sum().backward()
        grads.append([part.grad for part in parts])
    for left, right in zip(*grads, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_sink_collects_what_autograd_would_return(way, parts):
    """Of several passes: the weights' gradients, those of biases before and in the encoder, the part along the rows."""
    y, w, b, d, before = doubles((9, 4), (12, 4), (12,), (12, 5), (4,))
    target, expected, found = torch.randn(9, 5, dtype=torch.float64), [], []
    for collects in (False, True):
        out = [torch.full_like(leaf, torch.nan) for leaf in (w, d)]
        sink = kernels.Sink({"w": (w, out[0]), "d": (d, out[1])}) if collects else None
        into_w, into_d = (sink.of("w"), sink.of("d")) if sink else (None, None)
        for leaf in (w, b, d, before):
            leaf.grad = None
        for part in range(parts):
            offsets, ids = random_support(9, 12, 6, seed=part)
            codes = kernels.encode_at(y.detach() - before, w, b, offsets, ids, None, into_w).relu()
            made, square, _ = kernels.fit(codes, d, torch.zeros(5), target, offsets, ids, into_d)
            (square + made.cos().sum() + kernels.decode(codes, d, offsets, ids, into_d).sin().sum()).backward()
        if sink is None:
            expected = [w.grad, d.grad, b.grad, before.grad, (d.grad * d).sum(1)]
        else:
            assert w.grad is None
            assert d.grad is None
            squares = sink.finish()
            found = [*out, into_w.bias, -(into_w.through @ w), into_d.along]
            torch.testing.assert_close(squares["w"], out[0].square().sum())
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right)


def test_a_sink_tells_the_rows_with_an_entry(way):
    weight = torch.randn(6, 2)
    sink = kernels.Sink({"weight": (weight, torch.empty(6, 2))}, tells_rows=True)
    for ids in ([1, 4, 5], [3, 4, 5]):
        sink.of("weight").add(
            torch.tensor([0, 3]), torch.tensor(ids), torch.tensor([1.0, -2.0, 0.0]), torch.randn(1, 2)
        )
    assert sink.of("weight").touched.tolist() == [0, 1, 0, 1, 2, 0]  # what fills a buffer up is 0


def test_a_sink_without_passes_has_gradients_of_zero():
    weight, out = torch.randn(3, 2), torch.full((3, 2), torch.nan)
    sink = kernels.Sink({"weight": (weight, out)})
    assert float(sink.finish()["weight"]) == 0
    assert (out == 0).all()


def test_the_way_is_chosen_by_how_many_entries_there_are(monkeypatch):
    chosen = []
    for way in (segmented, dense):
        monkeypatch.setattr(way, "decode", lambda *given, way=way: chosen.append(way) or reference.decode(*given))
    for kept in (1, 9):
        offsets, ids = torch.tensor([0, kept]), torch.arange(kept)
        kernels.decode(torch.ones(kept), torch.ones(10, 2), offsets, ids)
    assert chosen == [segmented, dense]
