"""Encoders beside the linear one: a gate on pre-activations, matching pursuit, and the skip of cross-layer coders."""

import numpy as np
import pytest
import torch

import sae
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.lm.site import Site
from sae.selection.matching_pursuit import MatchingPursuit
from sae.selection.relu import ReLU
from sae.selection.topk import TopK
from sae.training.config import CoderConfig

D, M, N = 6, 20, 40


def randomized(spec, scale=1.0):
    coder = SparseCoder(spec)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return coder


@pytest.mark.parametrize("rule", [ReLU(), TopK(4)])
def test_a_gate_multiplies_pre_activations_with_gradients_and_without(rule):
    coder, x = randomized(CoderSpec(D, D, M, rule, encoder="glu", pre_bias="decoder")), torch.randn(N, D)
    W_enc, b_enc, W_glu, b_glu = (getattr(coder, n).detach().numpy() for n in ("W_enc", "b_enc", "W_glu", "b_glu"))
    y = x.numpy() - coder.b_dec.detach().numpy()
    h = (y @ W_enc.T + b_enc) / (1 + np.exp(-(y @ W_glu.T + b_glu)))
    if isinstance(rule, TopK):
        h = np.where(h >= np.sort(h, axis=1)[:, [-4]], h, 0)
    expected = np.maximum(h, 0)
    np.testing.assert_allclose(coder.encode(x).to_dense().numpy(), expected, rtol=1e-5, atol=1e-6)
    out, latents = coder(x)
    np.testing.assert_allclose(latents.to_dense().detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    for name in ("W_enc", "b_enc", "W_glu", "b_glu", "W_dec", "b_dec"):
        grad, parameter = getattr(coder, name).grad.clone(), getattr(coder, name)
        step = torch.zeros_like(parameter)
        step.view(-1)[grad.abs().argmax()] = 1e-3
        with torch.no_grad():
            parameter.add_(step)
            more = coder(x).out.square().sum().double()
            parameter.sub_(2 * step)
            less = coder(x).out.square().sum().double()
            parameter.add_(step)
        torch.testing.assert_close(
            (more - less) / 2e-3, grad.double().view(-1)[grad.abs().argmax()], rtol=2e-2, atol=1e-2
        )


def pursued(y, W, steps, threshold, stop):
    """Matching pursuit of one input, as its definition reads."""
    acts, rest = np.zeros(len(W)), y.copy()
    for _ in range(steps):
        scores = W @ rest
        best = int(scores.argmax())
        value, before = max(0.0, scores[best]), acts != 0
        acts[best] += value
        rest = rest - value * W[best]
        if (stop and ((acts != 0) == before).all()) or (threshold and np.linalg.norm(rest) < threshold):
            break
    return acts


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("steps", [1, 7, None])
def test_matching_pursuit_follows_its_definition(tmp_path, steps, stop, threshold):
    rule = MatchingPursuit(threshold, steps, stop)
    spec = CoderSpec(D, D, M, rule, encoder="matching_pursuit", pre_bias="decoder")
    coder = randomized(spec)
    with torch.no_grad():
        coder.W_dec.div_(coder.W_dec.norm(dim=1, keepdim=True))
        coder.W_enc.copy_(coder.W_dec)
    x = torch.randn(N, D)
    W, b = coder.W_dec.detach().double().numpy(), coder.b_dec.detach().double().numpy()
    expected = np.stack([pursued(row - b, W, steps or D, threshold, stop) for row in x.double().numpy()])
    found = coder.encode(x).to_dense().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert ((found != 0).sum(1) <= (steps or D)).all()
    np.testing.assert_allclose(coder(x).out.detach().numpy(), expected @ W + b, rtol=1e-4, atol=1e-5)
    sae.save(coder, tmp_path / "coder")
    assert torch.equal(sae.load(tmp_path / "coder").encode(x).values, coder.encode(x).values)


def test_matching_pursuit_is_for_loaded_coders():
    with pytest.raises(ConfigError, match=r"selection\.type: 'matching_pursuit' is for coders that are loaded"):
        CoderConfig(selection=MatchingPursuit()).validate(D)
    with pytest.raises(ConfigError, match="encoder: matching_pursuit and the selection of that name go together"):
        CoderSpec(D, D, M, MatchingPursuit())
    with pytest.raises(ConfigError, match=r"selection\.max_iterations: 0 must be at least 1"):
        CoderSpec(D, D, M, MatchingPursuit(max_iterations=0), encoder="matching_pursuit")


def test_the_skip_of_a_cross_layer_coder_goes_layer_by_layer():
    reads = tuple(Site(f"layers.{i}", "input", width=4) for i in range(3))
    writes = tuple(Site(f"layers.{i}", width=5) for i in range(3))
    spec = CoderSpec(12, 15, 9, ReLU(), reads, writes, pre_bias="none", cross_layer=True, skip=True)
    coder, x = randomized(spec), torch.randn(N, 12)
    assert coder.W_skip.shape == (15, 4)
    without = coder.decode(coder.encode(x), x)
    for layer in range(3):
        W = coder.W_skip[5 * layer : 5 * layer + 5]
        rest = (coder(x).out - without)[:, 5 * layer : 5 * layer + 5]
        torch.testing.assert_close(rest, x[:, 4 * layer : 4 * layer + 4] @ W.T)
