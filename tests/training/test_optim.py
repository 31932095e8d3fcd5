"""Optimization: the learning rate's law and schedule, the decoder constraint, the weight average."""

import copy

import pytest
import torch
from torch import nn

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.selection.topk import TopK
from sae.training.optim import Average, OptimConfig, Updater, normalize_decoder


def coder(d=6, m=20, dtype=torch.float32):
    made = SparseCoder(CoderSpec(d, d, m, TopK(3)), dtype=dtype)
    initialize(made, torch.zeros(d), 0)
    return made


def test_the_peak_falls_with_the_root_of_the_width():
    free = OptimConfig()
    assert free.peak(2**14) == 2e-4
    assert free.peak(2**16) == pytest.approx(1e-4)
    assert free.peak(2**10) / free.peak(2**14) == pytest.approx(4)
    assert OptimConfig(lr=0.3).peak(2**16) == 0.3


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("decay", [0.0, 0.2, 1.0])
def test_the_schedule_rises_holds_and_falls(steps, warmup, decay):
    rates = [OptimConfig(lr=1.0, warmup_share=warmup, decay_share=decay).rate(1, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert top <= max(0.05 * steps, 0)  # warm-up takes at most 5 % of the steps
    if decay:
        assert rates[-1] <= 1 / (decay * steps) + 1e-9
    if decay < 1 and steps == 1000:
        assert rates[100:700] == [1.0] * 600


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", -1.0),
        ("warmup_share", 0.06),
        ("warmup_share", -0.1),
        ("decay_share", 1.1),
        ("ema", 1.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("clip_norm", -1.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"optim\.{field}: {value}"):
        OptimConfig(**{field: value}).validate()


def test_the_projected_gradient_is_orthogonal_and_nothing_else_is_lost():
    """A first step of Adam follows the sign of the gradient that is left, where nothing is clipped."""
    made = coder(dtype=torch.float64)
    normalize_decoder(made)
    updater = Updater(made, OptimConfig(clip_norm=0.0), {})
    with updater.collecting() as sink:
        gradient, before = torch.randn_like(made.W_dec), made.W_dec.detach().clone()
        (made.W_dec * gradient).sum().backward()
    updater.finish(sink)
    torch.testing.assert_close(made.W_dec.grad, gradient)
    updater.update(updater.norms(), 1e-4, torch.tensor(True))
    left = updater.state["W_dec"]["exp_avg"] / 0.1
    assert float((left * before).sum(1).abs().max()) < 1e-12
    removed = gradient - left  # lies along the row
    torch.testing.assert_close(removed, (removed * before).sum(1, keepdim=True) * before)


def test_normalizing_keeps_directions_and_rows_of_zeros():
    coder = SparseCoder(CoderSpec(4, 4, 5, TopK(2)))
    weight = torch.randn(5, 4) * 100
    weight[2] = 0
    coder.W_dec.data.copy_(weight)
    directions = nn.functional.cosine_similarity(weight, weight.clone(), dim=1)
    normalize_decoder(coder)
    kept = coder.W_dec.detach()
    assert kept[2].tolist() == [0] * 4
    torch.testing.assert_close(nn.functional.cosine_similarity(kept, weight, dim=1), directions)
    torch.testing.assert_close(kept.norm(dim=1), torch.tensor([1.0, 1, 0, 1, 1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_the_average_equals_its_definition_at_1_10_and_1000_steps(decay):
    """sum_s decay^(t-s) (1 - decay) w_s / (1 - decay^t), summed anew in float64."""
    module = nn.Linear(3, 2)
    average, history = Average(module, decay), []
    for step in range(1, 1001):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3) * 0.1)
        average.update(module, torch.tensor(True))
        history.append(module.weight.detach().double().clone())
        if step in (1, 10, 1000):
            shares = torch.tensor([(1 - decay) * decay ** (step - s) for s in range(1, step + 1)]).double()
            assert float(shares.sum()) == pytest.approx(1 - decay**step)
            expected = torch.einsum("s,sij->ij", shares, torch.stack(history)) / (1 - decay**step)
            torch.testing.assert_close(average.weights()["weight"].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_updates_equal_torchs_own_adam_and_clipping(clip):
    mine = SparseCoder(CoderSpec(6, 6, 20, TopK(3), decoder_norm="free"))
    initialize(mine, torch.zeros(6), 0)
    theirs = copy.deepcopy(mine)
    config = OptimConfig(clip_norm=clip)
    ours = Updater(mine, config, {})
    other = torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=config.eps)
    for _ in range(5):
        gradients = {name: torch.randn_like(parameter) for name, parameter in mine.named_parameters()}
        with ours.collecting() as sink:
            sum((p * gradients[name]).sum() for name, p in mine.named_parameters()).backward()
        ours.finish(sink)
        ours.update(ours.norms(), 1e-2, torch.tensor(True))
        for name, parameter in theirs.named_parameters():
            parameter.grad = gradients[name]
        if clip:
            nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        other.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
