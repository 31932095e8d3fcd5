"""The CPU's compiled kernels: all that a path promises, at the sizes at which they block, on any number of threads."""

import inspect
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rigs.kernel_contract import *  # noqa: F403

from sae.kernels import native
from sae.kernels.native import building
from sae.kernels.update import Update

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def _built():
    if reason := native.available():
        pytest.skip(reason)


class Float32:
    """The kernels, for tests that try what they do not take as well."""

    def __getattr__(self, name):
        def kernel(*args, **more):
            if not native.takes(*(t for t in args if torch.is_tensor(t) and t.is_floating_point())):
                pytest.skip("float32 alone")
            return getattr(native, name)(*args, **more)

        return kernel


@pytest.fixture
def path():
    return Float32()


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture
def large():
    return False


@pytest.fixture(params=[1, 3])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Codes:
    """Random codes, dense in float64 and in rows; `hot` fires at every token, the last latent at none."""

    def __init__(self, n, d, m, share=0.2, hot=None):
        draw = torch.Generator().manual_seed(n + d + m)
        mask = torch.rand(n, m, generator=draw) < share
        mask[:, -1:] = False
        if hot is not None:
            mask[:, hot] = True
        self.n, self.m = n, m
        self.tokens, self.ids = mask.nonzero(as_tuple=True)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
        self.values = torch.randn(len(self.ids), generator=draw)
        self.weight, self.rows = torch.randn(m, d, generator=draw), torch.randn(n, d, generator=draw)

    def dense(self, values):
        return torch.zeros(self.n, self.m, dtype=torch.float64).index_put((self.tokens, self.ids), values.double())

    @property
    def support(self):
        return self.offsets, self.ids


SIZES = [
    dict(n=0, d=8, m=5),
    dict(n=1, d=1, m=1, hot=0),
    dict(n=5, d=16, m=9, share=0.0),
    dict(n=3, d=33, m=70, share=1.0),
    dict(n=40, d=131, m=200, hot=3),
    dict(n=700, d=300, m=17, hot=2),
]


@pytest.fixture(params=SIZES, ids=lambda size: "-".join(map(str, size.values())))
def codes(request):
    return Codes(**request.param)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=2e-4)


def stable_top(scores, k):
    return scores.double().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


@pytest.mark.parametrize(
    ("n", "m", "k"), [(9, 4096, 32), (9, 4096, 1), (9, 100, 7), (9, 64, 64), (9, 33, 1), (5, 3000, 700), (0, 9, 2)]
)
def test_the_largest_equal_a_stable_sort(n, m, k, threads):
    tied = (drawn(n, m) * 2).round() / 2
    holes = drawn(n, m).masked_fill(drawn(n, m, seed=1) > 0, -math.inf)
    signed = torch.where(drawn(n, m) > 0, 0.0, -0.0)
    few = drawn(n, m).masked_fill(drawn(n, m, seed=1) > 2, math.nan).masked_fill(drawn(n, m, seed=2) > 2, math.inf)
    many = drawn(n, m).masked_fill(drawn(n, m, seed=1) > 0, math.nan)
    rising = drawn(n, m).sort(dim=1).values
    for scores in (drawn(n, m), tied, tied.relu(), holes, signed, few, many, rising, rising.flip(1)):
        assert torch.equal(native.top_ids(scores, k), stable_top(scores, k))


@pytest.mark.parametrize("m", [1, 64, 100, 333])
def test_what_is_above_its_cut(m, threads):
    scores = (drawn(30, m) * 4).round() / 4
    scores[3, 0], scores[4, 0], scores[5, 0] = math.nan, math.inf, -math.inf
    for cuts in (torch.tensor([0.5]), (drawn(m, seed=1) * 4).round() / 4, torch.full((m,), math.inf)):
        expected = (~(scores <= cuts)).flatten().nonzero()[:, 0]
        for capacity in (0, 7, len(expected), 30 * m + 5):
            counts, places, count = native.above(scores, cuts, capacity)
            found = expected[:capacity]
            assert int(count) == len(expected)
            assert torch.equal(places[: len(found)], found)
            assert bool((places[len(found) :] == -1).all())
            assert torch.equal(counts, torch.bincount(found // m, minlength=30))


def test_products_on_a_support(codes, threads):
    dense = codes.dense(codes.values)
    close(native.decode(codes.values, codes.weight, *codes.support), dense @ codes.weight.double())
    found = native.products(*codes.support, codes.rows, codes.weight)
    close(found, (codes.rows.double() @ codes.weight.double().T)[codes.tokens, codes.ids])
    for rest in (codes.rows * 0.5, codes.rows.new_full(codes.rows.shape[1:], 0.5)):
        error, products = native.errors(codes.values, codes.weight, *codes.support, rest, codes.rows)
        expected = codes.rows.double() - rest - dense @ codes.weight.double()
        close(error, expected)
        assert torch.equal(products, native.products(*codes.support, error, codes.weight))


def test_gradients_of_weights(codes, threads):
    by = native.by_latent(*codes.support, codes.m)
    order = torch.argsort(codes.ids, stable=True)
    assert torch.equal(by.order, order.int())
    assert torch.equal(by.tokens, codes.tokens[order].int())
    assert torch.equal(by.starts.diff(), torch.bincount(codes.ids, minlength=codes.m))
    out = torch.full_like(codes.weight, math.nan)
    squares = native.weight_gradient(by, codes.values, codes.rows, out)
    close(out, codes.dense(codes.values).T @ codes.rows.double())
    assert not out[by.starts.diff() == 0].any()
    torch.testing.assert_close(squares, out.double().square().sum(), rtol=1e-5, atol=0)


def test_nan_goes_through_and_no_further():
    codes = Codes(20, 35, 50)
    codes.values[codes.offsets[7]] = math.nan
    assert native.decode(codes.values, codes.weight, *codes.support).isnan().any(1).nonzero().tolist() == [[7]]
    out = torch.empty_like(codes.weight)
    squares = native.weight_gradient(native.by_latent(*codes.support, codes.m), codes.values, codes.rows, out)
    assert out.isnan().any(1).nonzero().tolist() == [[int(codes.ids[codes.offsets[7]])]]
    assert bool(squares.isnan())


class Weights:
    """A matrix and the state of its optimizer; `step` takes gradients and says how many there were."""

    def __init__(self, *shape):
        self.weight = torch.nn.functional.normalize(drawn(*shape), dim=-1)
        self.mean, self.square = torch.zeros(shape), torch.zeros(shape)

    def step(self, number, gradient, applies=True, scale=0.7, **more):
        told = torch.tensor(float(number)), torch.tensor(scale), torch.tensor(applies)
        update = Update(1e-2, 0.9, 0.999, 1e-8, *told)
        native.adam(self.weight, gradient.clone(), self.mean, self.square, update, **more)


@pytest.mark.parametrize("shape", [(50, 37), (64, 64), (101,)])
@pytest.mark.parametrize("unit", [False, True])
def test_adam_is_that_of_torch_for_fifty_steps(shape, unit, threads):
    if unit and len(shape) == 1:
        pytest.skip("rows only")
    ours, theirs = Weights(*shape), torch.nn.Parameter(Weights(*shape).weight)
    optimizer = torch.optim.Adam([theirs], lr=1e-2, fused=True)
    half = torch.empty(shape, dtype=torch.bfloat16)
    for number in range(1, 51):
        gradient = drawn(*shape, seed=number) * 0.1
        along = None
        theirs.grad = gradient * 0.7
        if unit:
            along = (gradient * ours.weight).sum(1)
            theirs.grad -= (theirs.grad * theirs.detach()).sum(1, keepdim=True) * theirs.detach()
        ours.step(number, gradient, along=along, unit=unit, half=half)
        optimizer.step()
        if unit:
            with torch.no_grad():
                theirs /= theirs.norm(dim=1, keepdim=True)
    torch.testing.assert_close(ours.weight, theirs.detach(), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(ours.mean, optimizer.state[theirs]["exp_avg"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.square, optimizer.state[theirs]["exp_avg_sq"], rtol=1e-4, atol=1e-9)
    assert torch.equal(half, ours.weight.bfloat16())


def test_adam_that_does_not_apply_changes_nothing():
    ours, half = Weights(9, 21), torch.zeros(9, 21, dtype=torch.bfloat16)
    ours.step(1, drawn(9, 21))
    before = [t.clone() for t in (ours.weight, ours.mean, ours.square)]
    ours.step(2, torch.full((9, 21), math.nan), applies=False, along=torch.ones(9), unit=True, half=half)
    assert all(torch.equal(*pair) for pair in zip(before, (ours.weight, ours.mean, ours.square), strict=True))
    assert not half.any()


def test_adam_rounds_to_bfloat16_and_keeps_rows_of_zeros():
    ours, half = Weights(4, 8), torch.empty(4, 8, dtype=torch.bfloat16)
    ours.weight[0], ours.weight[1, 0] = 0.0, math.nan
    ours.step(1, torch.zeros(4, 8), unit=True, half=half)
    assert not ours.weight[0].any()
    assert torch.equal(half.isnan(), ours.weight.isnan())
    assert torch.equal(half[2:], ours.weight[2:].bfloat16())


def test_any_number_of_threads_gives_the_same_bits():
    codes, results = Codes(600, 150, 400, share=0.05, hot=7), []
    scores = drawn(50, 2000)
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        by = native.by_latent(*codes.support, codes.m)
        out, ours = torch.empty_like(codes.weight), Weights(400, 150)
        squares = native.weight_gradient(by, codes.values, codes.rows, out)
        ours.step(1, out, along=out.sum(1), unit=True)
        error = native.errors(codes.values, codes.weight, *codes.support, codes.rows, codes.rows)
        found = native.above(scores, torch.tensor([1.0]), 900)
        results.append([out, squares, ours.weight, ours.square, *error, *found, native.top_ids(scores, 20)])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


WITHOUT_TORCH = """
import ctypes, sys
assert not hasattr(ctypes.CDLL(None), "GOMP_parallel")
n, m, number = 500, 100, ctypes.c_int64
scores, out = (ctypes.c_float * (n * m))(*(i * 7919 % 10007 for i in range(n * m))), (number * n)()
ctypes.CDLL(sys.argv[1]).top_ids(3, scores, number(m), number(n), number(m), number(1), out)
print([*out] == [max(range(m), key=lambda c: scores[t * m + c]) for t in range(n)])
"""


def test_threads_of_its_own_do_where_pytorch_has_no_pool():
    command = [sys.executable, "-c", WITHOUT_TORCH, building.library()._name]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"


def test_what_would_be_read_wrongly_is_refused():
    """Also where shapes in signatures are not checked, as they are here."""
    codes = Codes(6, 8, 10)
    decode, products = inspect.unwrap(native.decode), inspect.unwrap(native.products)
    with pytest.raises(ValueError, match="weight"):
        decode(codes.values, codes.weight.double(), *codes.support)
    with pytest.raises(ValueError, match="values"):
        decode(codes.values[1:], codes.weight, *codes.support)
    with pytest.raises(ValueError, match="rows"):
        products(*codes.support, codes.rows[1:], codes.weight)
    with pytest.raises(ValueError, match="scores"):
        native.top_ids(codes.rows.T, 2)
    with pytest.raises(ValueError, match="11 of 10"):
        native.top_ids(drawn(2, 10), 11)
    with pytest.raises(IndexError, match="decode"):
        decode(codes.values, codes.weight, codes.offsets, codes.ids + 5)
    with pytest.raises(IndexError, match="by_latent"):
        native.by_latent(codes.offsets + 1, codes.ids, 10)
    assert native.takes(codes.weight, None)
    assert not native.takes(codes.weight.half())


def run_elsewhere(code, **environment):
    """Returns a process that looks for kernels in an environment of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


TELLS = "from sae.kernels.native import available; print(available())"


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    reason = str(building.library.__wrapped__())
    assert "\n" not in reason
    assert "install g++" in reason


def test_a_compiler_that_fails_is_told(monkeypatch, tmp_path):
    (tmp_path / "wrong").write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 1\n")
    (tmp_path / "wrong").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "wrong"))
    assert "fails: error: out of order" in str(building.library.__wrapped__())


@pytest.mark.slow
def test_processes_that_build_at_once_all_have_them(tmp_path):
    runs = [run_elsewhere(TELLS, TORCH_EXTENSIONS_DIR=str(tmp_path)) for _ in range(3)]
    assert [run.communicate()[0].strip() for run in runs] == ["None"] * 3
    assert [path.name for path in tmp_path.glob("sae-interp/*/*.so")] == ["kernels.so"]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx"])
def test_without_wide_registers_all_of_this_holds(flags):
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-m", "not slow", __file__]
    environment = {**os.environ, "CXX": f"c++ {flags}"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
