"""Every term of the loss: gradients of every parameter against finite differences, and micro-batches that add up."""

import pytest
import torch

from sae import plugins
from sae.coder import SparseCoder, initialize
from sae.objectives import Objective, Step
from sae.selection.topk import TopK
from sae.spec import CoderSpec

TERMS = plugins.names(Objective)


@pytest.fixture(params=TERMS)
def term(request):
    return TERMS[request.param]()


def setting(n=9, d=5, m=14, k=3):
    coder = SparseCoder(CoderSpec(d, d, m, TopK(k), variance=2.5), dtype=torch.float64)
    initialize(coder, torch.randn(d), 0)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    dead = torch.zeros(m, dtype=torch.bool)
    dead[[1, 4, 5, 9, 13]] = True
    return coder, torch.randn(n, d).double(), dead


def view(coder, x, dead, n_tokens, residual=None):
    run = coder.run(x)
    if residual is not None:  # what the term holds constant is held constant while parameters are moved
        run = type(run)(residual[1], run.scores, run.latents, run.prediction)
    return Step(coder, run, x, n_tokens, 2.5, 0.7, dead)


def test_gradient_equals_finite_differences(term):
    """AuxK stops the gradient at the residual and at its encoder input, so these are frozen for the differences."""
    coder, x, dead = setting()
    step = view(coder, x, dead, len(x))
    coder.zero_grad()
    term.loss(step).backward()
    frozen = (step.run.prediction.detach(), step.run.y.detach())

    def value():
        run = coder.run(x)
        if type(term).__name__ == "AuxK":
            run = type(run)(frozen[1], coder.preactivations(frozen[1]), run.latents, frozen[0])
        return term.loss(Step(coder, run, x, len(x), 2.5, 0.7, dead)).item()

    for name, parameter in coder.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        flat = parameter.data.view(-1)
        for i in range(0, flat.numel(), max(1, flat.numel() // 12)):
            old, h = float(flat[i]), 1e-6
            flat[i] = old + h
            up = value()
            flat[i] = old - h
            down = value()
            flat[i] = old
            assert (up - down) / (2 * h) == pytest.approx(float(grad.view(-1)[i]), rel=1e-4, abs=1e-7), (name, i)


def test_micro_batches_add_up(term):
    coder, x, dead = setting()
    whole = term.loss(view(coder, x, dead, len(x)))
    parts = sum(term.loss(view(coder, rows, dead, len(x))) for rows in x.split(4))
    torch.testing.assert_close(whole, parts)


def test_no_tokens_and_constant_input_are_finite(term):
    coder, x, dead = setting()
    assert torch.isfinite(term.loss(view(coder, x[:0], dead, 1)))
    assert torch.isfinite(term.loss(view(coder, torch.zeros_like(x), dead, len(x))))
    assert torch.isfinite(term.loss(view(coder, x, torch.ones_like(dead), len(x))))


def test_auxk_touches_dead_latents_only_and_is_zero_without_any():
    coder, x, dead = setting()
    auxk = TERMS["auxk"](k=2)
    auxk.loss(view(coder, x, dead, len(x))).backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        grad = getattr(coder, name).grad
        assert (grad[~dead] == 0).all()
        assert (grad[dead] != 0).any(), f"{name} learns too: the term is not decoder-only"
    assert coder.b_dec.grad is None or (coder.b_dec.grad == 0).all(), "no bias enters the explanation of the residual"
    assert auxk.loss(view(coder, x, torch.zeros_like(dead), len(x))).item() == 0.0


def test_auxk_equals_its_formula_densely():
    coder, x, dead = setting()
    step = view(coder, x, dead, len(x))
    scores = step.run.scores.clone()
    scores[:, ~dead] = -torch.inf
    kept = torch.zeros_like(scores).scatter_(1, scores.topk(2, dim=1).indices, 1.0)
    explained = (step.run.scores * kept).relu() @ coder.W_dec
    expected = (x - step.run.prediction - explained).square().sum() / (len(x) * 0.7)
    torch.testing.assert_close(TERMS["auxk"](k=2).loss(step), expected)
