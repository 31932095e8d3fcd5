"""SparseCoder: what it computes, its gradients, and every leading shape."""

import numpy as np
import pytest
import torch

from sae.base.errors import ConfigError
from sae.coder.coder import Choice, SparseCoder
from sae.coder.initialization import initialize
from sae.coder.normalization import Normalization, undo
from sae.coder.spec import CoderSpec
from sae.kernels.codes import SparseLatents, by_rows
from sae.selection.topk import TopK


def coder(d=6, m=16, k=4, dtype=torch.float32, **spec):
    made = SparseCoder(CoderSpec(d, d, m, TopK(k), **spec), dtype=dtype)
    initialize(made, torch.randn(d), 0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name != "b_dec":
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def dense_reference(c, x):
    """The equation of spec.py in NumPy."""
    w = {name: p.detach().double().numpy() for name, p in c.named_parameters()}
    x = x.double().numpy()
    kind, shift, spread = c.spec.normalization.kind, 0.0, 1.0
    if kind == "layer_norm":
        shift, spread = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1) + c.spec.normalization.eps
    elif kind == "l2":
        spread = np.linalg.norm(x, axis=1, keepdims=True) / x.shape[1] ** 0.5 + c.spec.normalization.eps
    elif kind == "scalar":
        spread = 1 / c.spec.normalization.scale
    y = (x - shift) / spread - {"none": 0.0, "decoder": w["b_dec"], "own": w.get("b_pre")}[c.spec.pre_bias]
    h = y @ w["W_enc"].T + w["b_enc"]
    compared = h * np.linalg.norm(w["W_dec"], axis=1) if c.spec.select_by_decoder_norm else h
    a = np.zeros_like(h)
    for t, row in enumerate(compared):
        kept = np.argsort(-row, kind="stable")[: c.spec.selection.k]
        a[t, kept] = np.maximum(h[t, kept], 0)
    out = (a @ w["W_dec"] + w["b_dec"]) * spread + shift
    return a, out + (x @ w["W_skip"].T if c.spec.skip else 0)


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"pre_bias": "none"},
        {"pre_bias": "own"},
        {"skip": True},
        {"select_by_decoder_norm": True, "decoder_norm": "free"},
        {"normalization": Normalization("layer_norm")},
        {"normalization": Normalization("l2")},
        {"normalization": Normalization("scalar", 0.37)},
    ],
    ids=str,
)
def test_encode_decode_equal_the_equation(spec):
    c, x = coder(**spec), torch.randn(40, 6) + 0.5
    a, out = dense_reference(c, x)
    z = c.encode(x)
    np.testing.assert_allclose(z.to_dense(), a, atol=1e-5)
    np.testing.assert_allclose(c(x).out.detach(), out, atol=1e-4)
    if not c.spec.skip:
        np.testing.assert_allclose(c.decode(z, x).detach(), out, atol=1e-4)


def test_per_token_normalization_needs_the_input_to_decode():
    c = coder(normalization=Normalization("layer_norm"))
    with pytest.raises(ValueError, match="pass x"):
        c.decode(c.encode(torch.randn(3, 6)))


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (0, 6), (2, 0, 6)])
def test_any_leading_shape(shape):
    c, x = coder(), torch.randn(shape)
    z = c.encode(x)
    assert z.to_dense().shape == (*shape[:-1], 16)
    assert c(x).out.shape == x.shape
    assert c(x).latents.to_dense().shape == (*shape[:-1], 16)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (0, 6)])
def test_dense_codes_are_the_sparse_ones_and_decode_alike(shape):
    c, x = coder(), torch.randn(shape)
    z, dense = c.encode(x), c.encode_dense(x)
    torch.testing.assert_close(dense.detach(), z.to_dense())
    assert dense.requires_grad == bool(x.numel())
    torch.testing.assert_close(c.decode(dense), c.decode(z))
    with torch.no_grad():
        assert not c.encode_dense(x).requires_grad


def test_dense_codes_have_the_gradients_of_the_codes():
    c, x = coder(dtype=torch.float64), torch.randn(9, 6).double().requires_grad_()
    ours = torch.autograd.grad(c.decode(c.encode_dense(x)).square().sum(), [x, *c.parameters()])
    right = torch.autograd.grad(c(x).out.square().sum(), [x, *c.parameters()])
    for mine, other in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, other)
    made = torch.randn(4, 16).double().relu().requires_grad_()  # somebody's own codes: zeros have a gradient, too
    mine, other = (
        torch.autograd.grad(f(made).square().sum(), made)[0] for f in (c.decode, lambda a: a @ c.W_dec + c.b_dec)
    )
    torch.testing.assert_close(mine, other)


def test_codes_of_another_width_are_not_decoded():
    c = coder()
    with pytest.raises(ValueError, match="they are of 4 latents, but this coder has 16"):
        c.decode(c.encode(torch.randn(3, 6))[:, 4:8])


@pytest.mark.parametrize(
    "given", [np.ones((2, 6)), np.ones(6, "f4"), [[1.0] * 6] * 2, torch.ones(6).bfloat16()], ids=repr
)
def test_arrays_and_lists_are_activations(given):
    c = coder()
    x = torch.as_tensor(np.asarray(given)) if not isinstance(given, torch.Tensor) else given
    torch.testing.assert_close(c(given).out, c(x.float()).out)
    torch.testing.assert_close(c.encode(given).to_dense(), c.encode_dense(given).detach())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("some text", r"x: expected activations \[..., d_in\], not a str"),
        ({"x": 1}, "not a dict"),
        ([[1.0], [1.0, 2.0]], "not a list"),
        (torch.arange(6), r"not torch.int64 \[6\]; token ids go through the language model"),
        (0.5, r"not torch.float64 \[\]"),
    ],
)
@pytest.mark.parametrize("act", ["encode", "encode_dense", "forward"])
def test_what_is_no_activations_is_one_line(given, message, act):
    with pytest.raises(TypeError, match=message):
        getattr(coder(), act)(given)


def test_arrays_and_lists_are_codes():
    c = coder()
    dense = c.encode_dense(torch.randn(3, 6)).detach()
    for given in (dense.numpy(), dense.tolist(), dense.double().numpy()):
        torch.testing.assert_close(c.decode(given), c.decode(dense))
    for given in (None, "text", coder(), torch.ones(3, 16, dtype=torch.long)):
        with pytest.raises(TypeError, match=r"^latents: expected codes \[\.\.\., d_sae\], not "):
            c.decode(given)


def test_a_coder_says_its_sizes_and_where_it_is():
    c = coder(dtype=torch.bfloat16)
    assert (c.d_in, c.d_sae, c.d_out, c.dtype, c.device.type) == (6, 16, 6, torch.bfloat16, "cpu")


def test_a_wrong_width_is_named():
    with pytest.raises(ValueError, match="last dimension is 5, but this coder has d_in = 6"):
        coder()(torch.randn(3, 5))


def test_chunks_change_nothing(monkeypatch):
    c, x = coder(), torch.randn(50, 6)
    whole = c.encode(x)
    monkeypatch.setattr("sae.coder.coder.CHUNK_ENTRIES", 16 * 7)
    parts = c.encode(x)
    assert torch.equal(whole.offsets, parts.offsets)
    assert torch.equal(whole.ids, parts.ids)
    torch.testing.assert_close(whole.values, parts.values)


def test_exactly_k_entries_before_relu_and_zeros_never_count_as_fired():
    c = coder(k=12)
    z = c.encode(torch.randn(30, 6))
    assert (z.offsets.diff() == 12).all()
    assert (z.values == 0).any()
    dense = z.to_dense()
    torch.testing.assert_close(z.l0(), (dense != 0).sum(1).float())
    assert torch.equal(z.fired(), (dense != 0).sum(0))
    ids, values = z.row(3)
    assert torch.equal(ids, dense[3].nonzero()[:, 0])
    assert (values > 0).all()


def test_all_gradients_equal_dense_autograd():
    c, x = coder(dtype=torch.float64, skip=True), torch.randn(9, 6).double().requires_grad_()
    loss = c(x).out.square().sum()
    ours = torch.autograd.grad(loss, [x, *c.parameters()])
    support = c.encode(x).to_dense() != 0
    h = (x - c.b_dec) @ c.W_enc.T + c.b_enc
    out = (h * support) @ c.W_dec + c.b_dec + x @ c.W_skip.T
    for mine, right in zip(ours, torch.autograd.grad(out.square().sum(), [x, *c.parameters()]), strict=True):
        torch.testing.assert_close(mine, right)


def test_low_precision_product_changes_the_choice_only():
    c, x = coder(d=32, m=128, k=8), torch.randn(64, 32)
    rounded = {name: tensor.bfloat16() for name, tensor in c.encoder_tensors().items()}
    scores = c.preactivations(c.look(x).y, rounded)
    assert scores.dtype == torch.bfloat16
    low = c.run(c.look(x), c.chosen(scores, *c.support(scores), exact=False), x)
    exact = (low.y @ c.W_enc.T + c.b_enc)[low.latents.tokens, low.latents.ids].relu()
    torch.testing.assert_close(low.latents.values, exact)
    same = (low.latents.to_dense() != 0) == (c.encode(x).to_dense() != 0)
    assert same.float().mean() > 0.98


def test_start_is_tied_and_unit_norm():
    c = SparseCoder(CoderSpec(8, 8, 32, TopK(4)))
    initialize(c, torch.arange(8.0), seed=3)
    assert torch.equal(c.W_enc, c.W_dec)
    torch.testing.assert_close(c.W_dec.norm(dim=1), torch.ones(32))
    assert torch.equal(c.b_dec, torch.arange(8.0))
    again = SparseCoder(c.spec)
    initialize(again, torch.zeros(8), seed=3)
    assert torch.equal(c.W_enc, again.W_enc)


def test_spec_survives_json_and_refuses_nonsense():
    spec = CoderSpec(6, 6, 16, TopK(4), normalization=Normalization("scalar", 0.5))
    assert CoderSpec.from_json(spec.to_json()) == spec
    with pytest.raises(ConfigError, match=r"selection\.k: 40 is not between 1 and d_sae = 16"):
        CoderSpec(6, 6, 16, TopK(40))
    with pytest.raises(ConfigError, match="pre_bias: 'decoder' needs d_in = d_out"):
        CoderSpec(6, 7, 16, TopK(4))


def test_sparse_latents():
    z = SparseLatents(*by_rows(torch.tensor([[0, 3], [1, 2]])), torch.tensor([1.0, 0.0, 2.0, 3.0]), 4)
    assert torch.equal(z.to_dense(), torch.tensor([[1.0, 0, 0, 0], [0, 2, 3, 0]]))
    with pytest.raises(IndexError):
        z.row(2)
    torch.testing.assert_close(SparseLatents.from_dense(z.to_dense()).to_dense(), z.to_dense())


@pytest.mark.parametrize("kind", ["none", "scalar", "layer_norm", "l2"])
def test_what_is_trained_is_what_is_put_out(kind):
    """The prediction that the loss sees, with the normalization undone, is the output: the skip path included."""
    made = coder(skip=True, normalization=Normalization(kind, 0.37))
    x = torch.randn(5, 6) * 3 + 1
    run = made.run(made.look(x), Choice(*made.support(made.scores(x))), x)
    torch.testing.assert_close(undo(run.prediction, run.how), made(x).out)
