"""One coder in training: constraints after every step, exact micro-batches and state, guards that change nothing."""

import copy
from functools import partial

import pytest
import torch
from rigs.fakes import measured
from rigs.waiting import waits

from sae import kernels
from sae.coder.normalization import Normalization
from sae.evaluation.metrics import fvu
from sae.kernels import dispatch
from sae.lm.masking import MaskSpec
from sae.objectives.aux_zipf import AuxZipf
from sae.objectives.auxk import AuxK
from sae.objectives.gate import Gate
from sae.objectives.l0 import L0
from sae.objectives.l1 import L1
from sae.objectives.matryoshka import Matryoshka
from sae.objectives.reconstruction import Reconstruction
from sae.selection.feature_choice import FeatureChoice
from sae.selection.gated import Gated
from sae.selection.groupmax import GroupMax
from sae.selection.jumprelu import JumpReLU
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.topk import TopK
from sae.training.beginning import new_coder
from sae.training.config import CoderConfig
from sae.training.optim import OptimConfig
from sae.training.step import NonFiniteError
from sae.training.trainer import CoderTrainer, Schedule

D, WIDTH, K, STEPS, BATCH = 12, 48, 4, 60, 128


def activations(n=STEPS * BATCH, seed=0):
    """Sums of few of 32 directions, with an offset: what a sparse coder is made for."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(32, D, generator=draw), dim=1)
    offset = torch.randn(D, generator=draw)
    codes = torch.rand(n, 32, generator=draw) * (torch.rand(n, 32, generator=draw) < 0.1)
    return codes @ directions * 3 + offset


def trainer(x=None, optim=None, schedule=None, **config):
    coder = CoderConfig(**{"d_sae": WIDTH, "selection": TopK(K)} | config)
    found = measured(activations() if x is None else x, MaskSpec(), 10.0, coder.normalization, coder.center)
    schedule = schedule or Schedule(STEPS, dead_after_tokens=3 * BATCH)
    return CoderTrainer(new_coder(coder, found), coder.objectives, optim or OptimConfig(lr=3e-3), schedule)


def run(made: CoderTrainer, steps=range(STEPS), x=None):
    x = activations() if x is None else x
    return [made.step(x[step * BATCH : (step + 1) * BATCH], step) for step in steps]


def weights(made: CoderTrainer):
    return {name: p.detach().clone() for name, p in made.coder.named_parameters()}


def applied(made: CoderTrainer):
    """The gradients that Adam has seen in the first step: clipped, the decoder's without the part along its rows."""
    return {name: state["exp_avg"] / (1 - 0.9) for name, state in made.updater.state.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def jumprelu(start: float, target: float = 0.0, weight: float = 1.0):
    selection, terms = JumpReLU(start), {"reconstruction": Reconstruction(), "l0": L0(weight=weight, target_l0=target)}
    return {"selection": selection, "objectives": terms, "normalization": Normalization("scalar")}


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (30.0, 500.0)])
def test_thresholds_start_in_the_spread_of_the_preactivations(scale, offset):
    x = torch.randn(20_000, D) * scale + offset
    made = trainer(x, **jumprelu(1.5), d_sae=64)
    assert made.coder.encode(x).l0().mean() == pytest.approx(64 * 0.0668, rel=0.1)  # P(N(0, 1) > 1.5)


@pytest.mark.parametrize("start", [pytest.param(0.3, marks=pytest.mark.slow), 4.0])
def test_l0_comes_to_its_target_from_above_and_below(start):
    x = activations(400 * BATCH)
    made = trainer(x, OptimConfig(lr=0.01), Schedule(400, 3 * BATCH), **jumprelu(start, target=5.0, weight=10.0))
    lines = run(made, range(400), x)
    assert abs(lines[0]["l0"] / 5 - 1) > 0.3
    assert sum(line["l0"] for line in lines[-50:]) / 50 == pytest.approx(5.0, rel=0.1)


@pytest.mark.parametrize("normalization", ["none", "scalar", "layer_norm", "l2"])
def test_training_lowers_the_error_on_fresh_data(normalization):
    made = trainer(normalization=Normalization(normalization))
    fresh = activations(STEPS * BATCH + 1000)[-1000:]
    before = fvu(fresh, made.coder(fresh).out)
    lines = run(made)
    after = fvu(fresh, made.trained()(fresh).out)
    assert after < 0.5 * before
    assert lines[-1]["loss.reconstruction"] == pytest.approx(lines[-1]["fvu"], rel=1e-4)
    assert lines[-1]["l0"] <= K


def test_decoder_rows_have_norm_one_after_every_step():
    made, x = trainer(optim=OptimConfig(lr=3e-2)), activations()
    for step in range(STEPS):
        run(made, [step], x)
        assert float((made.coder.W_dec.detach().norm(dim=1) - 1).abs().max()) <= 1e-6
    free = trainer(decoder_norm="free", optim=OptimConfig(lr=3e-2))
    run(free)
    assert float((free.coder.W_dec.detach().norm(dim=1) - 1).abs().max()) > 1e-2


def test_the_start_follows_the_recipe():
    x = activations()
    made = trainer(x)
    assert torch.equal(made.coder.W_enc, made.coder.W_dec)
    assert made.coder.b_enc.abs().sum() == 0
    torch.testing.assert_close(made.coder.b_dec.detach(), x.mean(0), atol=1e-5, rtol=1e-5)
    median = trainer(x, center="geometric_median").coder.b_dec.detach()
    assert (x - median).norm(dim=1).sum() < (x - x.mean(0)).norm(dim=1).sum()
    assert trainer(x, center="zero").coder.b_dec.abs().sum() == 0
    assert made.coder.spec.variance == pytest.approx(float(x.double().var(0, correction=0).sum()), rel=1e-5)


def test_the_loss_is_normalized_so_that_predicting_the_mean_costs_one():
    x = activations()
    made = trainer(x, objectives={"reconstruction": Reconstruction()})
    with torch.no_grad():
        made.coder.W_dec.zero_()
    assert made.step(x, 0)["loss"] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("size", [1, 50, 128])
def test_micro_batches_change_nothing_but_rounding(size):
    dead = 2 * BATCH
    whole = trainer(schedule=Schedule(STEPS, dead))
    parts = trainer(schedule=Schedule(STEPS, dead, micro_batch_tokens=size))
    for made in (whole, parts):
        with torch.no_grad():
            made.coder.b_enc[:10] = -1.0  # so that some are dead and AuxK takes part
    steps = range(3 if size == 1 else 5)
    a, b = run(whole, steps), run(parts, steps)
    assert any(line["loss.auxk"] > 0 for line in a)
    for one, other in zip(a, b, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-6)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], weight, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("ema", [0.0, 0.99])
def test_a_restored_trainer_continues_bit_for_bit(ema):
    optim = OptimConfig(lr=3e-3, ema=ema)
    whole, first, second = (trainer(optim=optim) for _ in range(3))
    lines = run(whole)
    run(first, range(33))
    tensors, values = copy.deepcopy(first.state())
    run(first, range(33, 36))  # what happens after the state was taken does not reach it
    second.load_state(tensors, values)
    assert run(second, range(33, STEPS)) == lines[33:]
    assert_same(weights(whole), weights(second))
    assert_same(whole.trained().state_dict(), second.trained().state_dict())
    assert whole.active_steps == second.active_steps


def test_the_average_is_what_is_saved_and_training_goes_on_without_it():
    plain, averaged = trainer(), trainer(optim=OptimConfig(lr=3e-3, ema=0.9))
    assert run(plain) == run(averaged)
    assert_same(weights(plain), weights(averaged))
    saved = averaged.trained()
    assert not torch.equal(saved.W_enc, averaged.coder.W_enc)
    torch.testing.assert_close(saved.W_dec.norm(dim=1), torch.ones(WIDTH), atol=1e-6, rtol=0)
    torch.testing.assert_close(saved.W_enc, averaged.average.weights()["W_enc"])  # type: ignore[union-attr]
    assert not any(p.requires_grad for p in saved.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_activation_leaves_everything_as_it_was(value):
    made, x = trainer(optim=OptimConfig(lr=3e-3, ema=0.9)), activations()
    run(made, range(10), x)
    before = copy.deepcopy(made.state())
    broken = x[:BATCH].clone()
    broken[[3, 70], 5] = value
    with pytest.raises(NonFiniteError, match=f"NaN or Inf in what was streamed, at 2 of {BATCH} tokens"):
        made.step(broken, 10).check()
    tensors, values = made.state()
    assert_same(before[0], tensors)
    assert before[1] == values


def test_a_loss_or_gradient_that_overflows_is_named_and_not_applied():
    made, x = trainer(), activations()
    run(made, range(3), x)
    before = weights(made)
    with pytest.raises(NonFiniteError, match=r"loss term reconstruction is inf|gradient of .* is not finite"):
        made.step(x[:BATCH] * 1e30, 3).check()
    assert_same(before, weights(made))
    assert run(made, range(3, 6), x)[-1]["fvu"] < 1  # and training goes on


def test_dead_latents_are_counted_in_tokens_and_revived():
    made, x = trainer(schedule=Schedule(STEPS, 3 * BATCH)), activations()
    with torch.no_grad():
        made.coder.b_enc[:10] = -100.0
    lines = run(made, range(4), x)
    assert [line["dead_share"] > 0 for line in lines] == [False, False, True, True]
    assert made.dead[:10].all()
    assert [line["loss.auxk"] > 0 for line in lines] == [False, False, False, True]  # dead at the start of the step
    assert made.active_steps["auxk"] == 1
    with torch.no_grad():
        made.coder.b_enc[:10] = 100.0
    run(made, [4], x)
    assert not made.dead[:4].any()  # they fire at every token now


def test_gradients_are_clipped_to_the_norm_and_steps_have_the_scheduled_rate():
    loose, tight = trainer(optim=OptimConfig(lr=1e-3, clip_norm=0)), trainer(optim=OptimConfig(lr=1e-3, clip_norm=1e-3))
    a, b = run(loose, [0]), run(tight, [0])
    assert a[0]["grad_norm"] == b[0]["grad_norm"] > 1e-3
    norms = [sum(float(g.square().sum()) for g in applied(made).values()) ** 0.5 for made in (loose, tight)]
    assert norms[1] <= 1e-3 * 1.001 < norms[0]
    rates = [line["lr"] for line in run(trainer())]
    assert rates == [OptimConfig(lr=3e-3).rate(WIDTH, step, STEPS) for step in range(STEPS)]


def test_a_term_of_weight_zero_is_left_out():
    made = trainer(objectives={"reconstruction": Reconstruction(), "auxk": AuxK(weight=0.0)})
    assert "loss.auxk" not in run(made, range(6))[-1]


def test_a_batch_of_which_nothing_is_left_is_a_step_without_tokens():
    made = trainer()
    run(made, range(3))
    found = made.step(torch.zeros(0, D), 3)
    assert (found["tokens"], found["loss"], found["l0"]) == (0, 0, 0)


def test_the_support_only_gradient_equals_dense_autograd_through_a_whole_step():
    x = activations()[:BATCH]
    made = trainer(optim=OptimConfig(lr=3e-3, clip_norm=0), objectives={"reconstruction": Reconstruction()})
    dense = {name: weight.clone().requires_grad_() for name, weight in weights(made).items()}
    h = (x - dense["b_dec"]) @ dense["W_enc"].T + dense["b_enc"]
    kept = torch.zeros_like(h).scatter(1, h.topk(K).indices, 1.0)
    out = (h * kept).relu() @ dense["W_dec"] + dense["b_dec"]
    ((x - out).square().sum(1).mean() / made.coder.spec.variance).backward()
    made.step(x, 0).check()
    for name, weight in dense.items():
        expected = weight.grad
        if name == "W_dec":
            rows = weight.detach()
            expected = expected - (expected * rows).sum(1, keepdim=True) * rows
        torch.testing.assert_close(applied(made)[name], expected, atol=1e-6, rtol=1e-4)


def gated(**terms):
    objectives = {"reconstruction": Reconstruction(), "gate": Gate(), "l1": L1(), **terms}
    return {"selection": Gated(), "objectives": objectives}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"selection": GroupMax(K)},
        {"selection": MutualChoice(K)},
        {"selection": FeatureChoice(K)},
        jumprelu(1.5, target=5.0),
        gated(),
        {"selection": ReLU(), "objectives": {"l1": L1()}},
        {"objectives": {"reconstruction": Reconstruction(), "aux_zipf": AuxZipf()}},
        {"objectives": {"matryoshka": Matryoshka()}},
    ],
    ids=["topk", "groupmax", "mutual_choice", "feature_choice", "jumprelu", "gated", "relu", "aux_zipf", "matryoshka"],
)
def test_no_step_waits_for_the_device(config, monkeypatch):
    """Between logs; dead latents and the step before are heard of one step late, without a read."""
    if dispatch.missing("native"):
        pytest.skip(dispatch.missing("native"))
    kernels.use("native")
    made, x = trainer(**config), activations()
    with torch.no_grad():
        made.coder.b_enc[:5] = -9.0  # so that AuxK has something to do
    for step in range(9):
        part = x[step * BATCH : (step + 1) * BATCH]
        if step < 6:
            made.step(part, step)
            continue
        with waits(monkeypatch) as found:
            made.step(part, step)
        assert not found


def test_a_step_without_room_for_its_codes_changes_nothing_until_it_is_repeated():
    """Latents that hardly fire suddenly all do; the step, and that behind it, are as with room for all at once."""
    x = activations()
    tight, roomy = trainer(**jumprelu(2.5), d_sae=256), trainer(**jumprelu(2.5), d_sae=256)
    roomy.chooser.begin = partial(lambda begin, *given: begin(*given[:-1], None), roomy.chooser.begin)
    for made in (tight, roomy):
        run(made, range(5), x)
        with torch.no_grad():
            made.coder.b_enc += 3.0
    before = weights(tight)
    assert not tight.chooser.dense(tight.chooser.per_token)
    late = [tight.step(x[:BATCH], 5), tight.step(x[BATCH : 2 * BATCH], 6)]  # the first is heard of behind the second
    assert not all(torch.equal(before[name], weight) for name, weight in weights(tight).items()), "both are repeated"
    expected = [roomy.step(x[:BATCH], 5), roomy.step(x[BATCH : 2 * BATCH], 6)]
    for one, other in zip(late, expected, strict=True):
        assert dict(one) == pytest.approx(dict(other), rel=1e-4)
        assert one["l0"] > 20
    for name, weight in weights(roomy).items():
        torch.testing.assert_close(weights(tight)[name], weight, atol=1e-4, rtol=1e-3)


def test_a_buffer_that_is_too_small_is_seen_at_once_and_holds_up_what_comes_behind():
    x = activations()
    made = trainer(**jumprelu(2.5), d_sae=256)
    run(made, range(5), x)
    with torch.no_grad():
        made.coder.b_enc += 3.0
    before = weights(made)
    figures = made.step(x[:BATCH], 5)
    assert_same(before, weights(made))
    assert figures.had_no_room()
    assert figures["l0"] > 20, "who reads the figures of a step has it repeated first"
    assert not torch.equal(before["W_dec"], made.coder.W_dec)
