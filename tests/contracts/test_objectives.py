"""Every term of the loss: gradients of every parameter against finite differences, and micro-batches that add up."""

from dataclasses import replace

import pytest
import torch

from sae.base import plugins, zipf
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.normalization import undo
from sae.coder.spec import CoderSpec
from sae.kernels.codes import where
from sae.lm.site import Site
from sae.objectives import Objective, Spliced, Start, Step
from sae.objectives.aux_zipf import AuxZipf, shortfall
from sae.objectives.auxk import AuxK, members
from sae.selection import Selection
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK

TERMS = plugins.names(Objective)
D, M, K, N = 5, 14, 3, 9
RULE = {"l0": "jumprelu", "gate": "gated"}  # what a term is made for; any other goes with TopK
STRAIGHT_THROUGH = {"l0": {"threshold"}}  # gradients that are estimates by definition: tested by their formula below


@pytest.fixture(params=TERMS)
def name(request):
    return request.param


def setting(name=""):
    kind = plugins.names(Selection)[RULE.get(name, "topk")]
    rule = kind(k=K) if kind is TopK else kind()
    coder = SparseCoder(CoderSpec(D, D, M, rule, variance=2.5), dtype=torch.float64)
    initialize(coder, torch.randn(D), 0)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return coder, torch.randn(N, D).double(), marks(1, 4, 5, 9, 13)


def marks(*dead):
    return torch.zeros(M, dtype=torch.bool).index_fill_(0, torch.tensor(dead), True)


def readout(x, how):
    """A language model of one linear layer, for the terms that run one."""
    draw = torch.Generator().manual_seed(7)
    weight = torch.randn(D, 11, generator=draw).double()
    following = torch.randint(0, 11, (len(x),), generator=draw)
    return lambda made: Spliced(x @ weight, undo(made, how) @ weight, following)


def view(term, coder, x, dead, n_tokens=N, run=None, density=None):
    """What a term sees of a step in which these latents are dead."""
    run = run or chosen_run(coder, x)
    begun = term.begin(Start(dead, torch.linspace(0.5, 0, M).double() if density is None else density, int(dead.sum())))
    beside = term.choose(coder, coder.preactivations(run.y.detach()), begun) if len(x) else None
    return Step(coder, run, x, n_tokens, 2.5, torch.tensor(0.7).double(), begun, beside, readout(x, run.how))


def chosen_run(coder, x, support=None):
    """A pass with what the rule chooses, or with a given support."""
    scores = coder.scores(x)
    return coder.run(coder.look(x), coder.chosen(scores, *(support or coder.support(coder.compared(scores)))), x)


def test_gradient_equals_finite_differences(name):
    """What a term holds constant (a residual, an encoder input, the decoder) is frozen for the differences."""
    coder, x, dead = setting(name)
    term = TERMS[name]()
    step = view(term, coder, x, dead)
    term.loss(step).backward()
    support = (step.run.latents.offsets, step.run.latents.ids)
    held = {name: getattr(step.run, name).detach().clone() for name in ("y", "prediction", "rest", "error")}
    held_decoder = coder.W_dec.detach().clone()

    def value():
        run = chosen_run(coder, x, support)
        if name in ("auxk", "aux_zipf"):
            run = replace(run, y=held["y"], prediction=held["prediction"], error=held["error"])
        if name != "gate":
            return term.loss(view(term, coder, x, dead, run=run)).item()
        moved = coder.W_dec.detach().clone()
        coder.W_dec.data.copy_(held_decoder)
        found = term.loss(view(term, coder, x, dead, run=replace(run, rest=held["rest"]))).item()
        coder.W_dec.data.copy_(moved)
        return found

    for parameter_name, parameter in coder.named_parameters():
        if parameter_name in STRAIGHT_THROUGH.get(name, ()):
            continue
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        flat = parameter.data.view(-1)
        for i in range(0, flat.numel(), max(1, flat.numel() // 12)):
            old, h = float(flat[i]), 1e-6
            flat[i] = old + h
            up = value()
            flat[i] = old - h
            down = value()
            flat[i] = old
            slope = (up - down) / (2 * h)
            assert slope == pytest.approx(float(grad.view(-1)[i]), rel=1e-4, abs=1e-7), (parameter_name, i)


def test_some_parameter_learns(name):
    coder, x, dead = setting(name)
    coder.spec.selection.activate  # noqa: B018
    if name == "l0":
        coder.threshold.data.fill_(float(coder.scores(x).quantile(0.7)))
    TERMS[name]().loss(view(TERMS[name](), coder, x, dead)).backward()
    assert sum(p.grad.abs().sum() for p in coder.parameters() if p.grad is not None) > 0


def test_micro_batches_add_up(name):
    coder, x, dead = setting(name)
    term = TERMS[name]()
    draws = readout(x, (0.0, 1.0))(x)
    whole, parts = view(term, coder, x, dead), 0.0
    for rows in torch.arange(N).split(4):
        step = view(term, coder, x[rows], dead)
        own = lambda made, rows=rows: Spliced(  # noqa: E731
            draws.clean[rows], readout(x[rows], (0.0, 1.0))(made).patched, draws.next_tokens[rows]
        )
        parts = parts + term.loss(replace(step, spliced=own))
    torch.testing.assert_close(term.loss(whole), parts)


def test_no_tokens_and_constant_input_are_finite(name):
    coder, x, dead = setting(name)
    term = TERMS[name]()
    assert torch.isfinite(term.loss(view(term, coder, x[:0], dead, 1)))
    assert torch.isfinite(term.loss(view(term, coder, torch.zeros_like(x), dead)))
    assert torch.isfinite(term.loss(view(term, coder, x, torch.ones_like(dead))))


def test_defaults_fit_the_rule_they_are_made_for(name):
    rule = plugins.names(Selection)[RULE.get(name, "topk")]()
    TERMS[name]().validate(64, rule)


def test_auxk_touches_dead_latents_only_and_is_zero_without_any():
    coder, x, dead = setting()
    auxk = AuxK(k=2)
    auxk.loss(view(auxk, coder, x, dead)).backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        grad = getattr(coder, name).grad
        assert (grad[~dead] == 0).all()
        assert (grad[dead] != 0).any(), f"{name} learns too: the term is not decoder-only"
    assert coder.b_dec.grad is None or (coder.b_dec.grad == 0).all(), "no bias enters the explanation of the residual"
    nobody = torch.zeros_like(dead)
    assert auxk.loss(view(auxk, coder, x, nobody)).item() == 0.0
    begun = auxk.begin(Start(nobody, torch.zeros(M), 3))  # the host only knows that there are no more than three
    step = replace(view(auxk, coder, x, nobody), begun=begun, beside=auxk.choose(coder, coder.scores(x), begun))
    coder.zero_grad()
    auxk.loss(step).backward()
    assert auxk.loss(step).item() == 0.0
    assert all((p.grad == 0).all() for p in coder.parameters() if p.grad is not None)


def test_auxk_equals_its_formula_densely():
    coder, x, dead = setting()
    step = view(AuxK(k=2), coder, x, dead)
    scores = coder.scores(x)
    scores[:, ~dead] = -torch.inf
    kept = torch.zeros_like(scores).scatter_(1, scores.topk(2, dim=1).indices, 1.0)
    explained = (coder.scores(x) * kept).relu() @ coder.W_dec
    expected = (x - step.run.prediction - explained).square().sum() / (N * 0.7)
    torch.testing.assert_close(AuxK(k=2).loss(step), expected)
    auxk = AuxK(k=M)  # as many entries as there are, of which those of the living only fill up
    begun = auxk.begin(Start(dead, torch.zeros(M), M))
    step = replace(step, begun=begun, beside=auxk.choose(coder, coder.scores(x), begun))
    explained = (coder.scores(x) * dead).relu() @ coder.W_dec
    torch.testing.assert_close(auxk.loss(step), (x - step.run.prediction - explained).square().sum() / (N * 0.7))


def test_aux_zipf_is_auxk_bit_for_bit_when_the_weight_is_the_dead_indicator():
    """All that live fire alike, as often as a flat curve expects; so only the dead fall short."""
    coder, x, dead = setting()
    density = torch.where(dead, 0.0, 0.2).double()
    assert torch.equal(shortfall(density, dead), dead.double())
    losses, grads = [], []
    for term in (AuxK(k=2), AuxZipf(k=2)):
        coder.zero_grad()
        losses.append(term.loss(view(term, coder, x, dead, density=density)))
        losses[-1].backward()
        grads.append({n: p.grad.clone() for n, p in coder.named_parameters() if p.grad is not None})
    assert torch.equal(*losses)
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        assert torch.equal(grads[0][name], grads[1][name]), name


def test_the_shortfall_is_one_for_the_dead_partial_for_the_dying_and_zero_for_the_rest():
    density = zipf.Zipf(1.0, 3.0).shares(200) * 8
    dead = torch.zeros(200, dtype=torch.bool)
    assert shortfall(density, dead, 0.5).max() == 0, "all as expected"
    density[50], density[60] = density[50] / 50, density[60] / 20
    dead[50] = True  # its running density has not come down to 0 yet
    found = shortfall(density, dead, 0.5)
    assert found[50] == 1.0
    assert 0 < found[60] < 1
    assert found.count_nonzero() <= 4
    assert shortfall(torch.zeros(9), torch.zeros(9) > 0, 0.5).max() == 0, "before the first step nothing is known"
    report = AuxZipf(tau=0.5).report(density, dead)
    assert report["dying_share"] == pytest.approx((found.count_nonzero() - 1) / 200)


def test_aux_zipf_helps_the_dying_in_proportion():
    coder, x, dead = setting()
    shares = torch.zeros(M).double()
    shares[2], shares[7] = 1.0, 0.25
    begun, term = members(shares.float(), M), AuxZipf(k=2)
    step = replace(view(term, coder, x, dead), begun=begun, beside=term.choose(coder, coder.scores(x), begun))
    term.loss(step).backward()
    used = coder.W_dec.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert set(used) <= {2, 7}


def test_jumprelu_thresholds_have_the_gradients_of_the_paper():
    """Equations 11 and 12 of 2407.14435, written out densely in float64."""
    coder, x, _ = setting("l0")
    rule = coder.spec.selection
    coder.threshold.data = torch.full((M,), 0.3)
    h, eps = coder.scores(x), rule.bandwidth
    run = chosen_run(coder, x, where(h > rule.cuts(coder.per_latent())))
    step = view(TERMS["l0"](), coder, x, torch.zeros(M, dtype=torch.bool), run=run)
    theta = coder.threshold.detach().double().expand_as(h)
    near = ((h - theta).abs() < eps / 2).double()
    assert near.sum() > 0

    TERMS["l0"]().loss(step).backward()
    torch.testing.assert_close(coder.threshold.grad.double(), -(near / eps).sum(0) / N, rtol=1e-5, atol=1e-6)
    assert coder.W_enc.grad is None or (coder.W_enc.grad == 0).all(), "H passes nothing on to h"

    coder.zero_grad()
    TERMS["reconstruction"]().loss(step).backward()
    upstream = -2 * (x - run.prediction.detach()) @ coder.W_dec.detach().T / (N * 2.5)
    expected = -(upstream * theta / eps * near).sum(0)
    torch.testing.assert_close(coder.threshold.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_penalties_follow_their_formulas():
    coder, x, dead = setting("gate")
    run, scores = chosen_run(coder, x), coder.scores(x)
    step = view(TERMS["l1"](), coder, x, dead, run=run)
    gates, norms = scores.relu(), coder.W_dec.norm(dim=1)
    torch.testing.assert_close(TERMS["l1"]().loss(step), (gates * norms).sum() / (N * 2.5**0.5))
    active = run.latents.to_dense()
    torch.testing.assert_close(TERMS["tanh"](c=3.0).loss(step), torch.tanh(3 * active * norms / 2.5**0.5).sum() / N)
    made = gates @ coder.W_dec + coder.b_dec
    torch.testing.assert_close(TERMS["gate"]().loss(step), (x - made).square().sum() / (N * 2.5))
    magnitudes = ((scores - coder.b_enc) * coder.r_mag.exp() + coder.b_mag).relu() * (scores > 0)
    torch.testing.assert_close(active, magnitudes, check_dtype=False)


def test_matryoshka_is_the_mean_over_prefixes():
    coder, x, dead = setting()
    step = view(TERMS["matryoshka"](), coder, x, dead)
    codes, expected = step.run.latents.to_dense(), []
    for width in (0, 4, 7, M):
        made = codes[:, :width] @ coder.W_dec[:width] + coder.b_dec
        expected.append((x - made).square().sum() / (N * 2.5))
    found = TERMS["matryoshka"](prefixes=(4 / M, 0.5, 1.0)).loss(step)
    torch.testing.assert_close(found, torch.stack(expected).mean())
    only = TERMS["matryoshka"](prefixes=(1.0,)).loss(step)
    torch.testing.assert_close(only, (expected[0] + TERMS["reconstruction"]().loss(step)) / 2)


def test_multi_topk_decodes_more_latents_and_equals_reconstruction_at_k():
    coder, x, dead = setting()
    same, wider, scores = TERMS["multi_topk"](k=K), TERMS["multi_topk"](), coder.scores(x)
    step = view(same, coder, x, dead)
    torch.testing.assert_close(same.loss(step), TERMS["reconstruction"]().loss(step))
    step = view(wider, coder, x, dead)
    wide = torch.zeros_like(scores).scatter_(1, scores.topk(4 * K).indices, 1.0)
    made = (scores * wide).relu() @ coder.W_dec + coder.b_dec
    torch.testing.assert_close(wider.loss(step), (x - made).square().sum() / (N * 2.5))


def test_sites_are_weighted():
    sites = (Site("a", width=2, weight=4.0), Site("b", width=3, weight=0.25))
    coder, x, dead = setting()
    term = TERMS["reconstruction"]()
    plain = term.loss(view(term, coder, x, dead))
    coder.spec = coder.spec.with_(reads=sites, writes=sites)
    step = view(term, coder, x, dead)
    parts = (x - step.run.prediction).square()
    expected = (4 * parts[:, :2].sum() + 0.25 * parts[:, 2:].sum()) / (N * 2.5)
    torch.testing.assert_close(TERMS["reconstruction"]().loss(step), expected)
    assert not torch.allclose(plain, expected)


def test_a_penalty_rises_and_is_adapted_to_its_target():
    term = TERMS["l1"](weight=2.0, target_l0=10.0, adapt_rate=0.1, warmup_share=0.5)
    one, three = (torch.tensor(number, dtype=torch.float64) for number in (1.0, 3.0))
    assert term.factor(0.25, three) == pytest.approx(3.0)
    assert term.factor(0.9, three) == pytest.approx(6.0)
    assert term.adapted(one, 10 * one) == 1.0
    assert term.adapted(one, 15 * one).item() == pytest.approx(1.0512710963760241)
    assert term.adapted(one, 1000 * one) == term.adapted(one, 20 * one) > 1 > term.adapted(one, 5 * one)
    assert TERMS["l1"]().adapted(one, 1e9 * one) == 1.0, "without a target the weight stays"


def test_thresholds_are_steered_by_the_slope_of_a_square():
    term, one = TERMS["l0"](target_l0=8.0), torch.ones((), dtype=torch.float64)
    for l0 in (4.0, 8.0, 9.5, 15.0):
        slope = ((l0 + 1e-6) / 8 - 1) ** 2 - ((l0 - 1e-6) / 8 - 1) ** 2
        assert term.adapted(7 * one, l0 * one).item() == pytest.approx(slope / 2e-6, abs=1e-8)
    assert term.adapted(one, 1e9 * one) == 0.25 == -term.adapted(one, 0 * one), (
        "a dense start counts as twice the target"
    )
    assert TERMS["l0"](target_l0=0.0).adapted(one, 1e9 * one) == 1.0, "without a target L0 itself is penalized"


BAD = [
    ("auxk", {"k": -1}, "topk"),
    ("aux_zipf", {"tau": 0.0}, "topk"),
    ("l1", {"target_l0": -1.0}, "relu"),
    ("l1", {"adapt_rate": 0.0}, "relu"),
    ("tanh", {"c": 0.0}, "relu"),
    ("tanh", {"warmup_share": 2.0}, "relu"),
    ("l0", {"target_l0": 1e9}, "jumprelu"),
    ("matryoshka", {"prefixes": (0.5, 0.25, 1.0)}, "topk"),
    ("matryoshka", {"prefixes": (0.5,)}, "topk"),
    ("multi_topk", {"k": -1}, "topk"),
    ("multi_topk", {"k": 0}, "relu"),
    ("matryoshka", {"prefixes": (0.001, 0.002, 1.0)}, "topk"),
]


@pytest.mark.parametrize(("name", "changes", "rule"), BAD, ids=str)
def test_constants_out_of_range_are_named(name, changes, rule):
    (field,) = changes
    with pytest.raises(ConfigError, match=rf"objectives\.{name}\.{field}: "):
        TERMS[name](**changes).validate(M, plugins.names(Selection)[rule]())


@pytest.mark.parametrize(("name", "rule"), [("l0", "topk"), ("gate", "relu")])
def test_terms_made_for_another_rule_are_refused(name, rule):
    with pytest.raises(ConfigError, match=rf"objectives\.{name}: needs .*{rule}"):
        TERMS[name]().validate(64, plugins.names(Selection)[rule]())


def test_l1_of_signed_codes_is_of_their_magnitudes():
    coder, x, dead = setting()
    coder.spec = coder.spec.with_(selection=SignedTopK(K))
    step = view(TERMS["l1"](), coder, x, dead)
    expected = (step.run.latents.to_dense().abs() * coder.W_dec.norm(dim=1)).sum() / (N * 2.5**0.5)
    torch.testing.assert_close(plugins.names(Objective)["l1"]().loss(step), expected)


@pytest.mark.parametrize(("budget", "kept"), [("block", 2), ("shared", 6)])
def test_multi_topk_of_a_cross_layer_coder_asks_as_selection_does(budget, kept):
    """With its k for that of the selection, it is the reconstruction: of every block, or of all together."""
    sites = [tuple(Site(f"{side}.{i}", width=4) for i in range(3)) for side in ("read", "write")]
    spec = CoderSpec(12, 12, 24, TopK(2), *sites, cross_layer=True, pre_bias="own", budget=budget, variance=2.5)
    coder = SparseCoder(spec)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_()
    x = torch.randn(N, 12)
    scores, target = coder.scores(x), torch.randn(N, 12)
    run = coder.run(coder.look(x), coder.chosen(scores, *coder.support(scores)), target)
    step = Step(coder, run, target, N, 2.5, torch.tensor(0.7))
    for term, same in ((TERMS["multi_topk"](k=kept), True), (TERMS["multi_topk"](), False)):
        found = term.loss(replace(step, beside=term.choose(coder, scores, None)))
        assert torch.allclose(found, TERMS["reconstruction"]().loss(step)) == same


@pytest.mark.parametrize("rule", ["signed_topk", "gated"])
def test_multi_topk_is_refused_where_the_largest_are_not_the_codes(rule):
    with pytest.raises(ConfigError, match=rf"objectives\.multi_topk: .* {rule}"):
        TERMS["multi_topk"](k=4).validate(M, plugins.names(Selection)[rule]())
