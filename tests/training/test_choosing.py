"""Mutual Choice, Feature Choice and gradient TopK: exact budgets, brute force, thresholds, and fallbacks."""

from functools import partial

import numpy as np
import pytest
import torch
from rigs.fakes import measured, tiny_lm
from rigs.sharing import Case
from rigs.sharing import new_trainer as of_case
from rigs.sharing import trained as run_of
from rigs.teams import together

from sae.base import zipf
from sae.base.errors import ConfigError
from sae.base.files import save_tensors
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.kernels.codes import Entries, where
from sae.kernels.largest import top_ids
from sae.lm.hooks import capture_with_gradients, hooked
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.loading import hub
from sae.objectives.l1 import L1
from sae.objectives.reconstruction import Reconstruction
from sae.parallel import collectives
from sae.parallel.cut import Cut
from sae.parallel.mesh import ALONE, Shape
from sae.parallel.ranks import Share
from sae.selection import Budget, Moment
from sae.selection.feature_choice import NEVER, FeatureChoice
from sae.selection.gradient_topk import GradientTopK
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.topk import TopK
from sae.training.beginning import new_coder
from sae.training.choosing import Chooser
from sae.training.config import CoderConfig
from sae.training.optim import OptimConfig
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer, Schedule

D, M, N, K = 12, 40, 64, 4


def made(rule, d=D, m=M, ties=False):
    coder = SparseCoder(CoderSpec(d, d, m, rule, variance=1.0))
    initialize(coder, torch.zeros(d), 0)
    if ties:  # whole numbers in, so that many scores are equal
        coder.W_enc.data = torch.randint(-1, 2, coder.W_enc.shape).float()
    return coder


def chosen(coder, x, sizes=None, chooser=None, progress=0.0):
    """The mask that a batch-wide rule chooses, and its chooser."""
    chooser = chooser or Chooser(coder)
    chooser.begin(progress, len(x))
    parts = list(x.split(sizes or len(x)))
    masks = []
    for found in chooser.whole_batch(list(map(coder.look, parts))):
        offsets, ids, *_ = found.by_rule
        mask = torch.zeros(len(offsets) - 1, coder.spec.d_sae, dtype=torch.bool)
        mask[torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff()), ids] = True
        masks.append(mask)
    chooser.finish()
    return torch.cat(masks), chooser


def brute_force(scores, count):
    order = np.argsort(-scores.double().numpy().reshape(-1), kind="stable")[:count]
    mask = np.zeros(scores.numel(), dtype=bool)
    mask[order] = True
    return torch.from_numpy(mask.reshape(scores.shape))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sizes", [None, 5, 63])
def test_mutual_choice_equals_a_brute_force_argsort_in_float64(ties, sizes):
    coder = made(MutualChoice(K), ties=ties)
    x = torch.randint(-2, 3, (N, D)).float() if ties else torch.randn(N, D)
    mask, _ = chosen(coder, x, sizes)
    expected = brute_force(coder.scores(x), K * N)
    assert torch.equal(mask, expected)
    assert int(mask.sum()) == K * N
    if ties:
        scores = coder.scores(x)
        cut = scores[expected].min()
        assert (scores == cut).sum() > (expected & (scores == cut)).sum() > 0, "the cut goes through equal scores"


def test_a_token_that_needs_more_gets_more():
    x = torch.randn(N, D)
    x[:8] *= 10
    counts = chosen(made(MutualChoice(K)), x)[0].sum(1)
    assert counts[:8].float().mean() > 2 * K > K > counts[8:].float().mean()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sizes", [None, 7])
@pytest.mark.parametrize(("s", "q"), [(1.0, 3.0), (0.0, 0.0), (3.0, 0.5), (None, None)])
def test_feature_choice_has_exact_column_sums_in_every_step(ties, sizes, s, q):
    coder = made(FeatureChoice(K, exponent=s, shift=q), ties=ties)
    _, chooser = chosen(coder, torch.randn(N, D))  # the first step is Mutual Choice's
    for step in range(5):
        x = torch.randint(-2, 3, (N, D)).float() if ties else torch.randn(N, D)
        mask, chooser = chosen(coder, x, sizes, chooser)
        budgets = chooser.states[0]["budgets"]
        assert int(budgets.sum()) == K * N
        assert 1 <= int(budgets.min()) <= int(budgets.max()) <= N
        assert torch.equal(mask.sum(0), budgets), step
        scores = coder.scores(x)
        for i in range(M):
            assert torch.equal(mask[:, i], brute_force(scores[:, i : i + 1], int(budgets[i]))[:, 0])


def test_equal_budgets_give_equal_columns_before_relu():
    """N m = k B: with a flat curve every latent takes k B / d_sae tokens, positive or not."""
    coder = made(FeatureChoice(5, exponent=0.0, shift=0.0))
    x = torch.randn(N, D)
    _, chooser = chosen(coder, x)
    mask, _ = chosen(coder, x, None, chooser)
    assert (mask.sum(0) == 5 * N // M).all()
    coder.b_enc.data -= 1.0
    mask, chooser = chosen(coder, x, None, chooser)
    assert (mask.sum(0) == 5 * N // M).all()
    chooser.begin(0.0, N)
    choice = chooser.whole_batch([coder.look(x)])[0].by_rule
    latents, ids = coder.run(coder.look(x), choice, x).latents, choice.ids
    assert (latents.values == 0).any(), "entries that are not positive are stored, zero ..."
    assert int(latents.fired().sum()) == int((latents.values > 0).sum()) < len(ids), "... and not fired"


def test_more_latents_than_entries_take_turns():
    """d_sae > k B: no floor of one; fractions carry over, so that every latent has its share in the long run."""
    m = 200
    coder = made(FeatureChoice(1, exponent=0.5, shift=1.0, density_decay=0.999), m=m)
    total, chooser = torch.zeros(m), None
    for step in range(150):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(32, D, generator=draw)
        mask, chooser = chosen(coder, x, None, chooser)
        assert int(mask.sum()) == 32
        total += mask.sum(0)
        if step:
            assert torch.equal(mask.sum(0), chooser.states[0]["budgets"])
    assert (total > 0).float().mean() > 0.9, int((total > 0).sum())
    state = chooser.states[0]
    assert float(state["carry"].abs().max()) <= 1
    again = Chooser(coder)
    again.load_state(chooser.state())
    x = torch.randn(32, D)
    assert torch.equal(chosen(coder, x, None, again)[0], chosen(coder, x, None, chooser)[0]), (
        "the carry is checkpointed"
    )


def test_turns_come_to_the_curve_even_where_it_asks_for_more_than_all_tokens():
    """What a latent cannot have goes to the others, in every step and so in the long run."""
    m, n, steps = 200, 16, 300
    rule = FeatureChoice(2, exponent=2.0, shift=0.0, density_decay=0.0)
    state = rule.start(m) | {"density": torch.linspace(1, 0.1, m).double(), "steps": torch.tensor(1)}
    dealt = torch.zeros(m)
    for _ in range(steps):
        moment = Moment(0.5, n, dict(state))
        rule.begin(moment)
        state, dealt = moment.state, dealt + moment.state["budgets"]
        assert int(moment.state["budgets"].sum()) == 2 * n
        assert int(moment.state["budgets"].max()) <= n
    expected = zipf.fill(2 * n * zipf.Zipf(2.0, 0.0).shares(m), 2 * n, n, 0)
    assert expected[0] == n, "the curve asks for more"
    torch.testing.assert_close(dealt.double() / steps, expected, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_thresholds_are_running_means_of_the_cuts(decay):
    """Of Mutual Choice the smallest kept; of Feature Choice the middle between each latent's last kept and its next."""
    batches = [torch.randn(N, D) for _ in range(4)]

    def mean(values):
        weights = [(1 - decay) * decay**age for age in range(len(values))]
        return sum(w * v for w, v in zip(weights, reversed(values), strict=True)) / sum(weights)

    def smallest(coder, x):
        scores = coder.scores(x)
        return scores[brute_force(scores, K * N)].min()

    coder, chooser = made(MutualChoice(K, threshold_decay=decay)), None
    for x in batches:
        _, chooser = chosen(coder, x, None, chooser)
    assert chooser.calibrated()[0] == pytest.approx((float(mean([smallest(coder, x) for x in batches])),))

    coder = made(FeatureChoice(K, threshold_decay=decay, exponent=2.0, shift=0.0))
    _, chooser = chosen(coder, batches[0])
    found, everywhere = [smallest(coder, batches[0]).expand(M)], 0  # the first step is Mutual Choice's
    for x in batches[1:]:
        counts = chosen(coder, x, None, chooser)[0].sum(0)
        everywhere += int((counts == N).sum())
        ordered = coder.scores(x).sort(dim=0, descending=True).values
        last, following = (ordered.gather(0, i[None].clamp(0, N - 1))[0] for i in (counts - 1, counts))
        middle = torch.where(counts == N, last, (last + following) / 2)  # of all tokens: the smallest
        found.append(middle.clamp_min(0))
    assert everywhere, "a latent has all tokens"
    torch.testing.assert_close(chooser.calibrated()[1].float(), mean(found), rtol=1e-5, atol=1e-6)


def test_a_steep_curve_fires_as_often_under_thresholds_as_in_training():
    """Also where the first latents have every token."""
    x = torch.randn(4 * N, D)
    coder = made(FeatureChoice(K, exponent=2.0, shift=0.0, threshold_decay=0.5))
    coder.b_enc.data += 2.0
    chooser = None
    for _ in range(12):
        mask, chooser = chosen(coder, x, None, chooser)
    coder.threshold.copy_(chooser.calibrated()[1])
    scores = coder.scores(x)
    trained, fired = (mask & (scores > 0)).float().mean(0), (coder.encode(x).to_dense() > 0).float().mean(0)
    assert trained.max() > 0.95
    torch.testing.assert_close(fired, trained, atol=0.03, rtol=0.05)


def test_what_a_rule_remembers_can_be_saved_before_the_first_step(tmp_path):
    for rule in (MutualChoice(K), FeatureChoice(K), GradientTopK(K)):
        save_tensors(tmp_path / "state.safetensors", Chooser(made(rule)).state())


def test_a_block_without_positive_scores_is_left_out_of_the_report():
    reads = tuple(Site(f"layers.{i}", width=4) for i in range(3))
    spec = CoderSpec(12, 12, 24, MutualChoice(2), reads, reads, pre_bias="own", cross_layer=True, variance=1.0)
    coder = SparseCoder(spec)
    initialize(coder, torch.zeros(12), 0)
    coder.b_enc.data[:8] = -1e3
    _, chooser = chosen(coder, torch.randn(N, 12))
    assert chooser.report()["threshold"] > 0


def test_a_batch_without_tokens_teaches_nothing():
    x = torch.randn(4 * N, D)
    for rule, terms in [(GradientTopK(K), {}), (FeatureChoice(K), {}), (ReLU(), {"l1": L1(target_l0=3.0)})]:
        trainer, _ = trained(rule, x, 3, x, objectives={"reconstruction": Reconstruction()} | terms)
        before, multipliers = {n: v.clone() for n, v in trainer.chooser.state().items()}, dict(trainer.multipliers)
        trainer.step(Batch(x[:0], x[:0], x[:0]), 2)
        for name, value in trainer.chooser.state().items():
            assert torch.equal(value, before[name]), name
        assert trainer.multipliers == multipliers


def test_ranks_that_were_given_no_token_yet_report_no_curve():
    """One of them holds no latent: there is nothing that it could fit a curve to."""

    def figures(mesh):
        trainer = of_case(Case(rule="feature_choice", options={"k": 1}, width=2), 3, torch.float32, mesh)
        return dict(trainer.step(Batch(torch.zeros(0, 24), torch.zeros(0, 24)), 0))

    for found in together(Shape(latents=3), figures):
        assert found["tokens"] == 0
        assert "zipf.r2" not in found


@pytest.mark.slow
def test_jumprelu_with_products_in_bfloat16_is_what_it_is_without_buffers(monkeypatch):
    run = partial(run_of, Case(rule="jumprelu"), 10, torch.float32, products=torch.bfloat16)
    found = run()

    def without(self, scores, compared, cuts):
        return self.coder.chosen(scores, *where(compared > cuts), self.exact)

    monkeypatch.setattr(Chooser, "_above", without)
    torch.testing.assert_close(found["loss"], run()["loss"], rtol=1e-5, atol=0)


def test_budgets_follow_the_curve_by_density():
    rule = FeatureChoice(K, exponent=1.0, shift=3.0, density_decay=0.0)
    coder = made(rule)
    coder.b_enc.data = torch.linspace(1, -1, M)
    _, chooser = chosen(coder, torch.randn(N, D))
    chooser.begin(0.1, N)
    state = chooser.moments[0].state
    expected = zipf.budgets(zipf.ranked(zipf.Zipf(1.0, 3.0).shares(M), state["density"]) * K * N, K * N, N, 1)
    assert torch.equal(state["budgets"], expected)
    assert chooser.report()["zipf.exponent"] == 1.0


def test_phased_training_starts_as_mutual_choice_and_goes_over():
    coder = made(FeatureChoice(K, mutual_share=0.5))
    x = torch.randn(N, D)
    mask, chooser = chosen(coder, x, progress=0.49)
    assert torch.equal(mask, brute_force(coder.scores(x), K * N))
    assert chooser.calibrated()[1].unique().numel() == 1, "one threshold for all, as of Mutual Choice"
    mask, chooser = chosen(coder, x, None, chooser, progress=0.5)
    assert torch.equal(mask.sum(0), chooser.states[0]["budgets"])
    assert chooser.calibrated()[1].unique().numel() > 1


def test_a_latent_that_had_no_token_yet_never_fires():
    coder = made(FeatureChoice(K))
    assert (coder.threshold == NEVER).all()
    assert coder.encode(torch.randn(5, D) * 1e6).l0().sum() == 0


@pytest.mark.parametrize("rule", [MutualChoice(K), FeatureChoice(K), GradientTopK(K)])
def test_what_was_calibrated_is_saved(tmp_path, rule):
    x = torch.randn(8 * N, D)
    coder = trained(rule, x, 6, x)[0].trained()
    hub.save(coder, tmp_path / "coder")
    again = hub.load(tmp_path / "coder")
    assert again.spec.calibration == coder.spec.calibration
    assert torch.equal(again.encode(x).to_dense(), coder.encode(x).to_dense())


def test_an_uncalibrated_mutual_choice_keeps_k_per_token():
    x = torch.randn(9, D)
    assert torch.equal(made(MutualChoice(K)).encode(x).to_dense(), made(TopK(K)).encode(x).to_dense())


def trained(rule, x, steps=200, gradients=None, **config):
    settings = CoderConfig(d_sae=M, selection=rule, **config)
    made = CoderTrainer(
        new_coder(settings, measured(x)), settings.objectives, OptimConfig(lr=3e-3), Schedule(steps, 10 * N)
    )
    lines = []
    for step in range(steps):
        at = step * N % (len(x) - N)
        g = None if gradients is None else gradients[at : at + N]
        lines.append(made.step(Batch(x[at : at + N], x[at : at + N], g), step))
    return made, lines


def test_k_goes_from_its_start_to_its_end():
    x = torch.randn(40 * N, D)
    for kind in (TopK, MutualChoice, FeatureChoice, GradientTopK):
        _, lines = trained(kind(k=3, k_start=11, anneal_share=0.5), x, 20, torch.zeros_like(x))
        l0 = [round(line["l0"]) for line in lines]
        assert l0[0] > 8, kind
        assert 2 <= l0[10] <= 3 >= l0[-1], kind
        assert sorted(l0, reverse=True) == l0 or kind is FeatureChoice
    assert Budget(k=4).k_at(0.0) == 4
    assert [Budget(k=4, k_start=8, anneal_share=0.5).k_at(p / 4) for p in range(5)] == [8, 6, 4, 4, 4]


def test_a_gradient_weight_of_zero_is_topk_bit_for_bit():
    x = torch.randn(30 * N, D)
    gradients = torch.randn_like(x)
    one, lines = trained(TopK(K), x, 30)
    other, augmented = trained(GradientTopK(K, beta=0.0), x, 30, gradients)
    for a, b in zip(lines, augmented, strict=True):
        assert a == {name: value for name, value in b.items() if name != "gradient_effect"}
    for name, weight in one.coder.state_dict().items():
        assert torch.equal(weight, other.coder.state_dict()[name])


@pytest.mark.parametrize("norm", ["batch", "token", "none"])
def test_the_score_of_gradient_topk_is_its_formula(norm):
    coder = made(GradientTopK(K, beta=0.7, gradient_norm=norm, inference="gradient"))
    x, g = torch.randn(N, D), torch.randn(N, D) * 5
    effect = (g @ coder.W_dec.detach().T).abs()
    mean = {"batch": 1.9, "token": effect.mean(1, keepdim=True), "none": 1.0}[norm]
    coder.spec = coder.spec.with_(calibration=(1.9,))
    scores = coder.scores(x)
    expected = torch.where(scores > 0, scores + 0.7 * scores * effect / mean, scores)
    torch.testing.assert_close(coder.compared(coder.scores(x), gradients=g), expected)
    ids = top_ids(expected, K)
    latents = coder.encode(x, g)
    assert torch.equal(latents.ids.view(N, K), ids)
    torch.testing.assert_close(latents.values.view(N, K), scores.gather(1, ids).relu(), msg="values are not augmented")


def test_gradients_are_those_of_normalized_outputs():
    """dL/dy = dL/dx times the scale that undoes the normalization: a unit of a latent moves x by that much more."""
    x, g = torch.randn(N, D), torch.randn(N, D)
    plain = made(GradientTopK(K, beta=1.0, gradient_norm="none", inference="gradient"))
    scaled = made(GradientTopK(K, beta=1.0, gradient_norm="none", inference="gradient"))
    scaled.spec = scaled.spec.with_(normalization=Normalization("scalar", 0.1))
    augmented = scaled.compared(scaled.scores(10 * x), scaled.look(10 * x).how, g)
    torch.testing.assert_close(augmented, plain.compared(plain.scores(x), gradients=10 * g))


def test_the_mean_effect_of_the_step_before_is_used_and_kept_for_inference():
    coder = made(GradientTopK(K, beta=2.0))
    chooser, x, g = Chooser(coder), torch.randn(N, D), torch.randn(N, D)
    look = coder.look(x)
    plain = coder.support(coder.scores(x))[1]
    chooser.begin(0.0, N)
    assert torch.equal(chooser.choose(look, g).by_rule.ids, plain), (
        "before any step there is no mean, and no gradient term"
    )
    chooser.finish()
    mean = float(coder.effects(g).double().mean())
    assert chooser.calibrated()[0] == pytest.approx((mean,))
    chooser.begin(0.1, N)
    assert not torch.equal(chooser.choose(look, g).by_rule.ids, plain)


def test_gradients_must_be_given_where_inference_looks_at_them_and_only_there():
    x = torch.randn(3, D)
    with pytest.raises(ValueError, match="pass those of the loss"):
        made(GradientTopK(K, inference="gradient")).encode(x)
    with pytest.raises(ValueError, match="looks at none"):
        made(GradientTopK(K)).encode(x, x)


def test_a_readout_that_ignores_half_of_the_space_draws_the_choice_into_the_other_half():
    """Acceptance (c) of 2411.10397's reading: as beta rises, chosen atoms lie more in the readout's row space."""
    coder = made(GradientTopK(K), m=400)
    x = torch.randn(500, D)
    g = torch.cat([torch.randn(500, D // 2), torch.zeros(500, D // 2)], 1)
    inside = []
    for beta in (0.0, 0.5, 2.0, 8.0):
        coder.spec = coder.spec.with_(selection=GradientTopK(K, beta=beta, gradient_norm="token", inference="gradient"))
        ids = coder.encode(x, g).ids
        inside.append(float(coder.W_dec[ids, : D // 2].detach().square().sum(1).mean()))
    assert sorted(inside) == inside
    assert inside[-1] > inside[0] + 0.1


def test_the_effect_predicts_what_ablating_a_latent_does_to_the_loss():
    """Acceptance (d): the correlation of z |<g, W_dec>| with the true change of the loss is above .7 on a tiny LM."""
    lm = tiny_lm(initializer_range=0.15)
    site = Site("model.layers.1", model="tiny")
    tokens = torch.randint(3, 200, (24, 10), generator=torch.Generator().manual_seed(0))
    activations, gradients = capture_with_gradients(lm, [site], tokens, MaskSpec((), 1))
    x, g = activations[site.name], gradients[site.name]
    coder = SparseCoder(CoderSpec(16, 16, 64, TopK(4), pre_bias="none"))
    initialize(coder, torch.zeros(16), 0)
    latents = coder.encode(x[:, 4])
    estimates, changes = [], []

    def loss(shift):
        def see(_, value):
            value = value.clone()
            value[:, 4] += shift
            return value

        with torch.no_grad(), hooked(lm.model, [site], see):
            logits = lm.model(tokens).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return losses[:, 1:].sum(1)

    clean = loss(torch.zeros(24, 16))
    for slot in range(4):
        ids, values = latents.ids.view(24, 4)[:, slot], latents.values.view(24, 4)[:, slot]
        changes.append((loss(-values[:, None] * coder.W_dec[ids].detach()) - clean).abs())
        estimates.append(values * (g[:, 4] * coder.W_dec[ids].detach()).sum(1).abs())
    both = torch.stack([torch.cat(estimates), torch.cat(changes)])
    assert float(torch.corrcoef(both)[0, 1]) > 0.7


def test_losses_that_differ_cannot_share_a_pass():
    from pathlib import Path

    from rigs.fakes import tiny_config

    grid = {"a": {"type": "gradient_topk", "k": 2}, "b": {"type": "gradient_topk", "k": 2, "loss": "sampled"}}
    with pytest.raises(ConfigError, match="next_token, sampled cannot share one pass"):
        tiny_config(Path("m"), Path("t"), {"grid": {"coder.selection": grid}}).validate()


RULES = {
    "mutual": MutualChoice(K),
    "annealed": MutualChoice(K, k_start=9),
    "feature": FeatureChoice(K),
    "few": FeatureChoice(1),
    "own densities": FeatureChoice(K, density="own", mutual_share=0.5),
}


@pytest.mark.parametrize(("rule", "shape"), [("mutual", Shape(data=3)), ("few", Shape(data=2, latents=2))])
def test_ranks_keep_what_one_would(rule, shape):
    """They have other tokens, some none, and other latents; what is remembered is the same, bit for bit."""
    assert_alike(RULES[rule], shape, ties=True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape(data=4), Shape(latents=3), Shape(data=3, latents=2)], ids=str)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_ranks_of_any_shape_keep_what_one_would(rule, ties, shape):
    assert_alike(RULES[rule], shape, ties)


def assert_alike(rule, shape, ties):
    whole = steps_of(ALONE, rule, ties)
    parts = together(shape, partial(steps_of, rule=rule, ties=ties))
    assert any(step > 0 and not careful for step, (_, careful, _) in enumerate(parts[0])), "some had room"
    for step, (entries, _, state) in enumerate(whole):
        every = [part[step] for part in parts]
        found = torch.cat([torch.stack(own[0]) for own in every], dim=1)
        order = (found[0] * M + found[1]).argsort()
        assert torch.equal(found[:, order], torch.stack(entries)), step
        assert all(rule.report(own[2]) == rule.report(state) for own in every)
        for name, value in state.items():
            for place, own in enumerate(every):
                of = Share(shape.place(place)[2], shape.latents).of(M)
                mine = value[of.start : of.stop] if value.dim() else value
                torch.testing.assert_close(own[2][name], mine, rtol=0, atol=0, equal_nan=True, msg=f"{step} {name}")


def steps_of(mesh, rule, ties):
    """What this rank keeps in some steps, whether these were repeated, and what it remembers after each."""
    cut = Cut(M, axis=mesh.latents)
    state, found = rule.start(cut.held), []
    for step in range(5):
        draw = torch.Generator().manual_seed(step)
        scores = torch.randn(N, M, generator=draw) * torch.rand(N, 1, generator=draw)
        scores = (scores * 2).round() if ties else scores
        bounds = [[0, N], [0, 40, N], [0, 30, 30, N], [0, 30, 30, 63, N]][mesh.data.world_size - 1]
        first, last = bounds[mesh.data.rank : mesh.data.rank + 2]
        own = cut.own(scores.T).T[first:last]
        for careful in (False, True):
            moment = Moment(step / 5, N, dict(state), careful=careful, mesh=mesh, cut=cut, n_own=len(own))
            rule.begin(moment)
            held = [Entries(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), scores[:0, 0])]
            for start in range(0, len(own), 20):
                tile = rule.candidates(own[start : start + 20], first + start, moment)
                held = [rule.reduce(Entries.cat([*held, tile]), moment) if start else tile]
            kept = rule.keep(held[0], moment)
            kept = Entries(kept.tokens, cut.ids(kept.ids), kept.values)
            failed = collectives.largest(torch.tensor(float(moment.failed or False)), mesh.team)
            if not failed:
                break
        state = moment.state
        found.append((kept, careful, state))
    return found


@pytest.mark.parametrize("sizes", [[30, 34], [1, 63], [7] * 9 + [1]])
@pytest.mark.parametrize("rule", [MutualChoice(K), FeatureChoice(K), FeatureChoice(1, density="own")])
def test_candidates_in_fixed_buffers_hold_what_is_kept_or_the_step_fails(rule, sizes):
    state, failed = rule.start(M), []
    for step, scale in enumerate([1.0, 1.0, 1.02, 0.97, 1.0, 0.5, 30.0]):
        scores = torch.randn(N, M, generator=torch.Generator().manual_seed(step)) * scale
        scores = (scores * 8).round() / 8 if step % 2 else scores  # ties across the cut
        moments, found = [Moment(0.5, N, dict(state), careful) for careful in (False, True)], []
        for moment in moments:
            rule.begin(moment)
            held, first = [], 0
            for tile in scores.split(sizes):
                held.append(rule.candidates(tile, first, moment))
                held = [rule.reduce(Entries.cat(held), moment)] if first else held
                first += len(tile)
            found.append(rule.keep(held[0], moment))
        failed.append(moments[0].failed is not None and bool(moments[0].failed))
        if not failed[-1]:
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            assert all(torch.equal(value, moments[1].state[name]) for name, value in moments[0].state.items())
        state = moments[1].state
    assert failed[:-1] == [False] * 5 + [True], "a cut that leaps is looked for anew: there are too few ..."
    small = rule.k == 1 or (type(rule) is MutualChoice and len(sizes) == 2)  # buffers are
    assert failed[-1] == small, "... and then too many, where there is not room for all"
