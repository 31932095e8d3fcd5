"""Folds: every one that is allowed leaves output, support and latents what they were; every other one is refused."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sae
from sae.base import plugins
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.encoders.glu import GLU
from sae.lm.site import Site
from sae.selection import NEVER, Selection
from sae.selection.feature_choice import FeatureChoice
from sae.selection.gated import Gated
from sae.selection.gradient_topk import GradientTopK
from sae.selection.groupmax import GroupMax
from sae.selection.jumprelu import JumpReLU
from sae.selection.matching_pursuit import MatchingPursuit
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK
from sae.selection.unrectified_topk import UnrectifiedTopK

D_SAE, TOKENS = 24, 40
ALONE = {"relu": ReLU(), "jumprelu": JumpReLU(), "gated": Gated(), "feature_choice": FeatureChoice(2)}
TOGETHER = {
    "topk": TopK(3),
    "signed_topk": SignedTopK(3),
    "unrectified_topk": UnrectifiedTopK(3),
    "groupmax": GroupMax(4),
    "mutual_choice": MutualChoice(2),
    "gradient_topk": GradientTopK(3),
}
CALIBRATED = {"calibrated": MutualChoice(2)}
GRADIENT = {
    f"gradient by {norm}": GradientTopK(3, beta=2.0, gradient_norm=norm, inference="gradient")
    for norm in ("batch", "token", "none")
}
LINEAR = {**ALONE, **TOGETHER, **CALIBRATED, **GRADIENT}
RULES = {**LINEAR, "matching_pursuit": MatchingPursuit(0.5, 6)}
NEW = {name: kind for name, kind in plugins.names(Selection).items() if kind not in map(type, RULES.values())}
RULES |= {name: kind(k=3) if "k" in kind.__dataclass_fields__ else kind() for name, kind in NEW.items()}

ONE = (Site("a", scale=0.6),)
TWO = (Site("a", width=4, scale=0.6), Site("b", width=3, scale=1.7))
ALIKE = (Site("a", width=4, scale=0.6), Site("b", width=3, scale=0.6))
THREE_IN = tuple(Site(f"in.{i}", width=4, scale=scale) for i, scale in enumerate((0.6, 1.3, 1.8)))
THREE_OUT = tuple(Site(f"out.{i}", width=3, scale=scale) for i, scale in enumerate((2.0, 0.7, 0.5)))
SITES = {
    "nameless": (6, 6, {}),
    "autoencoder": (6, 6, {"reads": ONE, "writes": ONE}),
    "square": (6, 6, {"reads": ONE, "writes": (Site("b", scale=2.5),)}),
    "transcoder": (6, 5, {"reads": ONE, "writes": (Site("b", scale=2.5),)}),
    "crosscoder": (7, 7, {"reads": TWO, "writes": TWO}),
    "alike": (7, 7, {"reads": ALIKE, "writes": ALIKE}),
    "cross_layer": (12, 9, {"reads": THREE_IN, "writes": THREE_OUT, "cross_layer": True}),
    "cross_layer_auto": (12, 12, {"reads": THREE_IN, "writes": THREE_IN, "cross_layer": True}),
}
NORMALIZATIONS = {
    "none": Normalization(),
    "scalar": Normalization("scalar", 0.8),
    "layer_norm": Normalization("layer_norm", eps=0.3),
    "biased": Normalization("layer_norm", eps=0.3, unbiased=False, undo_eps=False),
    "l2": Normalization("l2"),
    "center": Normalization("center"),
}


def randomized(spec, seed=0, zero=(), unit=False):
    """A coder of random tensors, with decoder rows of different norms (or of one), some of them zero."""
    draw = torch.Generator().manual_seed(seed)
    coder = SparseCoder(spec).requires_grad_(False)
    for name, tensor in coder.state_dict().items():
        tensor.copy_(0.5 * torch.randn(tensor.shape, generator=draw))
        if name == "threshold":
            tensor.copy_(0.1 + torch.rand(tensor.shape, generator=draw))
    for block in coder.decoders():
        rows = torch.arange(len(block))
        block *= 0.3 + 3 * torch.rand(len(block), 1, generator=draw)
        if unit:
            block /= block.norm(dim=1, keepdim=True)
        block[torch.isin(rows, torch.tensor(zero))] = 0
    if spec.encoder == "matching_pursuit":
        coder.W_enc.copy_(coder.W_dec)
        coder.b_enc.zero_()
    return coder


def batch(coder, seed=1):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, coder.spec.d_in, generator=draw) + 0.5
    g = torch.randn(TOKENS, coder.spec.d_out, generator=draw)
    return x, g if coder.spec.selection.looks_at_gradients else None


def calibrated(coder, seed=2):
    """The coder with numbers that its rule may have found in training."""
    x, _ = batch(coder, seed)
    compared = coder.compared(coder.scores(x))
    cuts = tuple(float(compared[:, group].quantile(0.8)) for group in coder.rule_groups())
    if isinstance(coder.spec.selection, GradientTopK):
        cuts = tuple(0.5 + 0.1 * number for number in range(len(cuts)))
    coder.spec = coder.spec.with_(calibration=cuts)
    return coder


def made(rule="relu", sites="autoencoder", normalization="none", seed=0, zero=(), unit=False, **fields):
    selection, (d_in, d_out, where) = RULES[rule], SITES[sites]
    fields = {"pre_bias": "own", "decoder_norm": "free", "variance": 3.0} | where | fields
    if selection.encoder:
        fields["encoder"] = "matching_pursuit"
    spec = CoderSpec(d_in, d_out, D_SAE, selection, normalization=NORMALIZATIONS[normalization], **fields)
    coder = randomized(spec, seed, zero, unit)
    return calibrated(coder) if rule in {**CALIBRATED, **GRADIENT} else coder


def clear(run, x, gradients):
    """Which tokens are so far from a threshold or a tie that no rounding moves their support."""
    draw, fired = torch.Generator().manual_seed(3), run(x, gradients)[0] != 0
    steady = torch.ones(len(x), dtype=torch.bool)
    for _ in range(4):
        near = run(x + 3e-4 * torch.randn(x.shape, generator=draw), gradients)[0] != 0
        steady &= (near == fired).all(1)
    return steady


def close(found, expected):
    worst = (found - expected).abs().max() / expected.abs().max().clamp_min(1)
    assert worst <= 1e-5, worst


def running(coder):
    """(dense latents, output) of the coder, as a function of inputs and gradients."""

    def run(x, gradients):
        out, latents = coder(x, gradients)
        return latents.to_dense(), out

    return run


def same(folded, run, x, gradients, factor=1.0):
    """Asserts that a folded coder has the output of `run`, and its latents times a factor."""
    keep = clear(run, x, gradients)
    assert keep.sum() >= TOKENS // 4, f"{keep.sum()} tokens are clear of thresholds and ties"
    acts, out = (part[keep] for part in run(x, gradients))
    found = folded(x[keep], None if gradients is None else gradients[keep])
    dense = found.latents.to_dense()
    assert 0 < (acts != 0).sum() < acts.numel(), "everything fires, or nothing"
    assert torch.equal(dense != 0, acts * factor != 0)
    close(dense, acts * factor)
    close(found.out, out)


def whitener(d, seed=4):
    draw = torch.Generator().manual_seed(seed)
    (left, _), (right, _) = (torch.linalg.qr(torch.randn(d, d, generator=draw).double()) for _ in range(2))
    sizes = 0.5 + torch.rand(d, generator=draw).double()
    return torch.randn(d, generator=draw), left @ torch.diag(sizes) @ right, right.T @ torch.diag(1 / sizes) @ left.T


def units(coder):
    """What "raw" units multiply each latent by: 1 / s of what it reads."""
    own = coder.spec.normalization.scale
    blocks = coder.spec.reads if coder.spec.cross_layer else coder.spec.reads[:1] or (Site("a"),)
    if coder.spec.normalization.kind != "scalar":
        return torch.ones(D_SAE)
    return torch.tensor([1 / (own * site.scale) for site in blocks]).repeat_interleave(D_SAE // len(blocks))


def norms(coder):
    n = coder.decoder_norms()
    return torch.where(n > 0, n, 0.0 if coder.spec.select_by_decoder_norm else 1.0)


def wrapped(run, mean, matrix, inverse):
    """What a coder of whitened inputs, and of gradients at them, is as a function of raw ones."""

    def raw(x, gradients):
        seen = gradients if gradients is None else (gradients.double() @ inverse.T).float()
        acts, out = run(((x.double() - mean) @ matrix).float(), seen)
        return acts, (out.double() @ inverse + mean).float()

    return raw


FOLDS = {
    "scale": lambda coder: coder.fold_scale(),
    "raw": lambda coder: coder.fold_scale("raw"),
    "decoder_norm": lambda coder: coder.fold_decoder_norm(),
    "whitening": lambda coder: coder.fold_whitening(*whitener(coder.spec.d_in)),
    "center": lambda coder: coder.fold_token_norm(),
    "unbiased": lambda coder: coder.fold_token_norm(unbiased=True),
    "biased": lambda coder: coder.fold_token_norm(unbiased=False),
    "pre_bias": lambda coder: coder.fold_pre_bias(),
}


@st.composite
def kinds(draw):
    """Arguments of `made`: any kind of coder that there is."""
    rule = draw(st.sampled_from(list(RULES)))
    sites = draw(st.sampled_from(["nameless", "autoencoder"] if RULES[rule].encoder else list(SITES)))
    reads_what_it_writes = SITES[sites][2].get("reads") == SITES[sites][2].get("writes")
    normalizations = list(NORMALIZATIONS) if reads_what_it_writes else ["none", "scalar"]
    fields = {"skip": draw(st.booleans()), "select_by_decoder_norm": draw(st.booleans())}
    fields["encoder"] = draw(st.sampled_from(["linear", "glu"]))
    pre_biases = ["none", "own"]
    if "cross_layer" in SITES[sites][2]:
        fields["budget"] = draw(st.sampled_from(["block", "shared"]))
    else:
        pre_biases += ["decoder"] * (SITES[sites][0] == SITES[sites][1])
    if rule == "jumprelu":
        fields["select_by_decoder_norm"] = False
    zero = draw(st.sampled_from([(), (1,), (0, 5)]))
    fields["pre_bias"] = draw(st.sampled_from(pre_biases))
    fields |= {"rule": rule, "sites": sites, "normalization": draw(st.sampled_from(normalizations))}
    return fields | {"seed": draw(st.integers(0, 2**20)), "zero": zero, "unit": draw(st.booleans())}


@settings(deadline=None, max_examples=100)
@given(kinds(), st.lists(st.sampled_from(list(FOLDS)), min_size=1, max_size=5))
def test_any_sequence_of_folds_that_are_allowed_leaves_the_map(kind, names):
    coder = made(**kind)
    x, gradients = batch(coder)
    run, factor, folded, done = running(coder), torch.ones(D_SAE), coder, 0
    for name in names:
        try:
            after = FOLDS[name](folded)
        except ConfigError:
            continue
        done += 1
        if name == "raw":
            factor = factor * units(folded)
        elif name == "decoder_norm":
            factor = factor * norms(folded)
        elif name == "whitening":
            run = wrapped(run, *whitener(coder.spec.d_in))
        folded = after
    assume(done)
    same(folded, run, x, gradients, factor)


@pytest.mark.parametrize("units_", ["normalized", "raw"])
@pytest.mark.parametrize(
    ("rule", "sites"),
    [(rule, "autoencoder") for rule in LINEAR]
    + [(rule, sites) for rule in ("relu", "topk") for sites in ("nameless", "square", "transcoder", "alike")]
    + [(rule, "cross_layer") for rule in ("gated", "calibrated", "gradient_topk")],
)
def test_a_scale_folds_under_every_rule(rule, sites, units_):
    for by_norm in (False, True) if rule != "jumprelu" and sites != "cross_layer" else (False,):
        coder = made(rule, sites, "scalar", skip=True, select_by_decoder_norm=by_norm)
        folded = coder.fold_scale(units_)
        assert folded.spec.normalization == Normalization()
        assert {site.scale for site in (*folded.spec.reads, *folded.spec.writes)} <= {1.0}
        same(folded, running(coder), *batch(coder), units(coder) if units_ == "raw" else 1.0)


def test_latents_of_blocks_in_units_of_their_own_have_no_effects_to_compare():
    with pytest.raises(ConfigError, match=r"^selection.inference: 'gradient' looks at"):
        made("gradient by batch", "cross_layer", "scalar").fold_scale("raw")


@pytest.mark.parametrize("units_", ["normalized", "raw"])
def test_a_decoder_pre_bias_becomes_its_own_where_inputs_and_outputs_have_other_scales(units_):
    coder = made("topk", "square", "scalar", pre_bias="decoder")
    folded = coder.fold_scale(units_)
    assert folded.spec.pre_bias == "own"
    same(folded, running(coder), *batch(coder), units(coder) if units_ == "raw" else 1.0)
    assert made("topk", "autoencoder", "scalar", pre_bias="decoder").fold_scale(units_).spec.pre_bias == "decoder"


@pytest.mark.parametrize(
    ("rule", "sites"),
    [(rule, "autoencoder") for rule in (*ALONE, *CALIBRATED)]
    + [("relu", "crosscoder"), ("gated", "cross_layer"), ("calibrated", "cross_layer")],
)
def test_decoder_norms_fold_where_each_latent_decides_for_itself(rule, sites):
    coder = made(rule, sites, zero=(2,))
    folded = coder.fold_decoder_norm()
    n = folded.decoder_norms()
    close(n, (coder.decoder_norms() > 0).float())
    assert (n == 0).any()
    same(folded, running(coder), *batch(coder), norms(coder))
    assert not folded.spec.calibration
    assert isinstance(folded.spec.selection, JumpReLU if rule == "calibrated" else type(coder.spec.selection))


@pytest.mark.parametrize(
    ("rule", "sites"),
    [(rule, "autoencoder") for rule in (*TOGETHER, *CALIBRATED, "relu", "feature_choice")]
    + [("topk", "crosscoder"), ("calibrated", "cross_layer")],
)
def test_decoder_norms_fold_where_selection_compares_with_them(rule, sites):
    coder = made(rule, sites, zero=(0, 2), select_by_decoder_norm=True)
    folded = coder.fold_decoder_norm()
    assert not folded.spec.select_by_decoder_norm
    assert folded.spec.selection == coder.spec.selection
    assert folded.spec.calibration == coder.spec.calibration
    same(folded, running(coder), *batch(coder), norms(coder))


@pytest.mark.parametrize("rule", [*TOGETHER, *GRADIENT])
def test_rules_that_compare_latents_allow_one_factor_for_all(rule):
    with pytest.raises(ConfigError, match=r"^selection.*(compares latents with each other|'gradient' looks at)"):
        made(rule).fold_decoder_norm()
    coder = made(rule, unit=True)
    coder.W_dec *= 2.5
    same(coder.fold_decoder_norm(), running(coder), *batch(coder), 2.5)


def test_a_latents_own_threshold_follows_the_norm_that_it_is_compared_with():
    coder = made("feature_choice", "crosscoder", "scalar", select_by_decoder_norm=True)
    same(coder.fold_scale(), running(coder), *batch(coder))
    coder, w = made("feature_choice", select_by_decoder_norm=True), whitener(6)
    same(coder.fold_whitening(*w), wrapped(running(coder), *w), *batch(coder))


def test_a_mean_effect_of_other_decoders_is_dropped():
    coder = made("gradient_topk", select_by_decoder_norm=True)
    coder.spec = coder.spec.with_(calibration=(0.7,))
    assert coder.fold_decoder_norm().spec.calibration == ()
    assert coder.fold_pre_bias().spec.calibration == (0.7,)


def test_an_unknown_rule_is_not_guessed_at(monkeypatch):
    monkeypatch.setattr(ReLU, "units", None)
    with pytest.raises(ConfigError, match=r"^selection: 'relu' is not a rule of which it is known"):
        made("relu").fold_decoder_norm()
    monkeypatch.setattr(ReLU, "reads_bias", True)
    with pytest.raises(ConfigError, match=r"^selection: 'relu' looks at b_enc, and it is not known"):
        made("relu").fold_pre_bias()
    monkeypatch.setattr(GLU, "scaled", None)
    with pytest.raises(ConfigError, match=r"^encoder: 'glu' is not one of which it is known"):
        made("gated", encoder="glu").fold_decoder_norm()


@pytest.mark.parametrize(
    ("rule", "pre_bias", "encoder"),
    [(rule, "none", "linear") for rule in LINEAR]
    + [("gated", "decoder", "linear"), ("gated", "own", "glu"), ("topk", "none", "glu"), ("topk", "decoder", "glu")],
)
def test_whitening_folds_under_every_rule_and_pre_bias(rule, pre_bias, encoder):
    coder, w = made(rule, pre_bias=pre_bias, encoder=encoder), whitener(6)
    folded = coder.fold_whitening(*w)
    same(folded, wrapped(running(coder), *w), *batch(coder))
    assert folded.spec.pre_bias == pre_bias
    assert folded.spec.variance is None


@pytest.mark.parametrize("sites", ["nameless", "crosscoder", "cross_layer_auto"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("rule", "pre_bias"), [("topk", "none"), ("gated", "own"), ("gradient by batch", "decoder")])
def test_centering_becomes_a_skip_path(rule, sites, pre_bias, skip):
    pre_bias = "own" if sites == "cross_layer_auto" and pre_bias == "decoder" else pre_bias
    coder = made(rule, sites, "center", pre_bias=pre_bias, skip=skip)
    folded = coder.fold_token_norm()
    assert folded.spec.normalization == Normalization()
    assert folded.spec.skip
    same(folded, running(coder), *batch(coder))
    if sites == "nameless":
        close(folded.W_enc.mean(1), torch.zeros(D_SAE))


@pytest.mark.parametrize(("unbiased", "undo_eps"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("rule", "pre_bias"), [("jumprelu", "decoder"), ("calibrated", "own"), ("topk", "none")])
def test_the_deviation_of_layer_norm_can_be_either(rule, pre_bias, unbiased, undo_eps):
    by_norm = rule == "calibrated"
    coder = made(rule, pre_bias=pre_bias, skip=True, select_by_decoder_norm=by_norm)
    coder.spec = coder.spec.with_(normalization=Normalization("layer_norm", 1.0, 0.3, unbiased, undo_eps))
    folded = coder.fold_token_norm(unbiased=not unbiased)
    assert folded.spec.normalization.unbiased is not unbiased
    assert folded.spec.normalization.eps == pytest.approx(0.3 * (5 / 6) ** (0.5 if unbiased else -0.5))
    same(folded, running(coder), *batch(coder))
    assert coder.fold_token_norm(unbiased=unbiased).spec == coder.spec


@pytest.mark.parametrize(("rule", "sites"), [(rule, "autoencoder") for rule in LINEAR] + [("gated", "cross_layer")])
def test_a_pre_bias_folds_under_every_rule(rule, sites):
    for pre_bias, encoder in (("own", "linear"), ("none", "glu"), ("decoder", "glu")):
        if (sites, pre_bias) == ("cross_layer", "decoder"):
            continue
        coder = made(rule, sites, "scalar", pre_bias=pre_bias, encoder=encoder)
        folded = coder.fold_pre_bias()
        assert folded.spec.pre_bias == "none"
        assert "b_pre" not in folded.state_dict()
        same(folded, running(coder), *batch(coder))


@pytest.mark.parametrize("pre_bias", ["none", "decoder", "own"])
def test_matching_pursuit_folds_one_scale_in_raw_units(pre_bias):
    coder = made("matching_pursuit", normalization="scalar", unit=True, pre_bias=pre_bias)
    folded = coder.fold_scale("raw")
    same(folded, running(coder), *batch(coder), units(coder))
    assert torch.equal(folded.W_dec, coder.W_dec)
    assert folded.spec.selection.residual_threshold == pytest.approx(0.5 / 0.48)


W = whitener(6)
REFUSED = {
    "units: 'rwa' is not one of": (lambda c: c.fold_scale("rwa"), {}),
    "normalization.kind: 'l2' is no constant factor": (lambda c: c.fold_scale(), {"normalization": "l2"}),
    "units: 'raw' needs one factor for all that a latent reads, not 0.48, 1.36": (
        lambda c: c.fold_scale("raw"),
        {"sites": "crosscoder", "normalization": "scalar"},
    ),
    "selection: 'topk' compares latents .* it needs fold_decoder_norm first": (
        lambda c: c.fold_scale(),
        {"rule": "topk", "sites": "crosscoder", "normalization": "scalar", "select_by_decoder_norm": True},
    ),
    "selection: 'mutual_choice' compares latents .* it needs fold_decoder_norm first|selection: 'batch_topk'": (
        lambda c: c.fold_scale(),
        {"rule": "calibrated", "sites": "crosscoder", "normalization": "scalar", "select_by_decoder_norm": True},
    ),
    "selection: 'matching_pursuit' encodes by its decoder": (
        lambda c: c.fold_scale(),
        {"rule": "matching_pursuit", "normalization": "scalar"},
    ),
    "selection: 'matching_pursuit' encodes by its decoder, ": (
        lambda c: c.fold_decoder_norm(),
        {"rule": "matching_pursuit"},
    ),
    "encoder: 'matching_pursuit' encodes by its decoder": (
        lambda c: c.fold_token_norm(),
        {"rule": "matching_pursuit", "normalization": "center"},
    ),
    "pre_bias: 'own' cannot go into b_enc": (lambda c: c.fold_pre_bias(), {"rule": "matching_pursuit"}),
    "encoder: 'matching_pursuit' does not go with whitening": (
        lambda c: c.fold_whitening(*W),
        {"rule": "matching_pursuit"},
    ),
    "selection.inference: 'gradient' looks at": (
        lambda c: c.fold_decoder_norm(),
        {"rule": "gradient by batch", "select_by_decoder_norm": True},
    ),
    "normalization.kind: 'scalar' does not go with whitening": (
        lambda c: c.fold_whitening(*W),
        {"normalization": "scalar"},
    ),
    "skip: True does not go with whitening": (lambda c: c.fold_whitening(*W), {"skip": True}),
    r"writes: \['b'\] does not go with whitening": (lambda c: c.fold_whitening(*W), {"sites": "square"}),
    "cross_layer: True does not go with whitening": (lambda c: c.fold_whitening(*W), {"sites": "cross_layer"}),
    r"mean: its shape is \(5,\); whitening of d_in = 6 needs \(6,\)": (
        lambda c: c.fold_whitening(W[0][:5], *W[1:]),
        {},
    ),
    "inverse: it is not that of the whitening matrix": (lambda c: c.fold_whitening(*W[:2], W[2].T), {}),
    "selection: 'topk' compares latents with each other, and this fold": (
        lambda c: c.fold_whitening(*W),
        {"rule": "topk", "select_by_decoder_norm": True},
    ),
    "normalization.kind: 'l2' divides every token by its own norm": (
        lambda c: c.fold_token_norm(),
        {"normalization": "l2"},
    ),
    "normalization.kind: 'layer_norm' divides every token by its own deviation": (
        lambda c: c.fold_token_norm(),
        {"normalization": "layer_norm"},
    ),
    "normalization.kind: 'scalar' is one factor for all tokens; fold_scale": (
        lambda c: c.fold_token_norm(),
        {"normalization": "scalar"},
    ),
    "unbiased: True is of normalization 'layer_norm', not of 'center'": (
        lambda c: c.fold_token_norm(unbiased=True),
        {"normalization": "center"},
    ),
    r"unbiased: one eps does not do for sites of different widths \[3, 4\]": (
        lambda c: c.fold_token_norm(unbiased=False),
        {"sites": "crosscoder", "normalization": "layer_norm"},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_folded_is_refused_with_the_reason(message):
    fold, fields = REFUSED[message]
    coder = made(**fields)
    with pytest.raises(ConfigError, match=f"^({message})") as refused:
        fold(coder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("rule", ["topk", "gated", "feature_choice", "calibrated", "matching_pursuit"])
def test_a_folded_coder_is_saved_and_loaded_and_the_first_one_is_untouched(rule, tmp_path):
    coder = made(rule, normalization="scalar", zero=(1,), unit=True)
    before = {name: tensor.clone() for name, tensor in coder.state_dict().items()}
    spec = coder.spec
    folded = coder.fold_scale("raw")
    folded = folded if rule == "matching_pursuit" else folded.fold_decoder_norm().fold_pre_bias()
    sae.save(folded, tmp_path)
    loaded = sae.load(tmp_path)
    assert loaded.spec == folded.spec
    assert loaded.state_dict().keys() == folded.state_dict().keys()
    for name, tensor in folded.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert coder.spec is spec
    assert all(torch.equal(tensor, before[name]) for name, tensor in coder.state_dict().items())


def test_nothing_is_folded_at_load(tmp_path):
    coder = made("topk", normalization="scalar", pre_bias="decoder", select_by_decoder_norm=True)
    sae.save(coder, tmp_path)
    loaded = sae.load(tmp_path)
    assert loaded.spec == coder.spec
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in coder.state_dict().items())


def test_a_coder_in_bfloat16_folds_in_float32():
    coder = made("jumprelu", normalization="scalar").to_dtype(torch.bfloat16)
    folded = coder.fold_scale()
    assert {tensor.dtype for tensor in folded.state_dict().values()} == {torch.float32}
    exact = made("jumprelu", normalization="scalar")
    exact.load_state_dict({name: tensor.float() for name, tensor in coder.state_dict().items()})
    same(folded, running(exact), *batch(exact))


def test_a_latent_that_never_fired_does_not_begin_to():
    coder = made("feature_choice", normalization="scalar", sites="transcoder")
    coder.get_buffer("threshold")[:4] = NEVER
    for fold in ("scale", "raw", "decoder_norm"):
        folded = FOLDS[fold](coder)
        assert torch.isfinite(folded.get_buffer("threshold")).all()
        assert (folded.encode(100 * batch(coder)[0]).fired()[:4] == 0).all()


def test_numbers_of_the_normalized_space_follow_the_scale():
    assert made(normalization="scalar").fold_scale().spec.variance == pytest.approx(3.0 / 0.48**2)
    assert made(normalization="scalar", variance=None).fold_scale().spec.variance is None
    assert made(sites="crosscoder", normalization="scalar").fold_scale().spec.variance is None
    assert made(normalization="center").fold_token_norm().spec.variance is None
    assert made(decoder_norm="unit", unit=True).fold_decoder_norm().spec.decoder_norm == "unit"
    assert made(decoder_norm="unit", unit=True, normalization="scalar").fold_scale().spec.decoder_norm == "free"


# Independent of the toolkit: the formulas of the field's notes on folding, in NumPy.


def arrays(coder):
    return {name: tensor.double().numpy() for name, tensor in coder.state_dict().items()}


def positive(h):
    return np.maximum(h, 0)


@pytest.mark.parametrize("units_", ["normalized", "raw"])
@pytest.mark.parametrize("pre_bias", ["none", "decoder"])
def test_both_conventions_of_a_scale_are_the_fields_own(units_, pre_bias):
    s, x = 0.48, batch(made())[0].double().numpy()
    coder = made("jumprelu", normalization="scalar", pre_bias=pre_bias)
    old, new = arrays(coder), arrays(coder.fold_scale(units_))
    expected = {
        "normalized": {"W_enc": s, "W_dec": 1 / s, "b_dec": 1 / s, "b_enc": 1, "threshold": 1},
        "raw": {"W_enc": 1, "W_dec": 1, "b_dec": 1 / s, "b_enc": 1 / s, "threshold": 1 / s},
    }[units_]
    for name, factor in expected.items():
        np.testing.assert_allclose(new[name], old[name] * factor, rtol=1e-6)
    p = {"none": 0, "decoder": 1}[pre_bias]
    h = (s * x - p * old["b_dec"]) @ old["W_enc"].T + old["b_enc"]
    a = h * (h > old["threshold"])
    raw = (x - p * new["b_dec"]) @ new["W_enc"].T + new["b_enc"]
    b = raw * (raw > new["threshold"])
    np.testing.assert_allclose(b * (s if units_ == "raw" else 1), a, atol=1e-6)
    np.testing.assert_allclose(b @ new["W_dec"] + new["b_dec"], (a @ old["W_dec"] + old["b_dec"]) / s, atol=1e-5)


def test_a_transcoder_in_raw_units_has_its_decoder_times_the_quotient_of_both_scales():
    into, out = 0.8 * 0.6, 0.8 * 2.5
    coder = made("topk", "transcoder", "scalar")
    old, new = arrays(coder), arrays(coder.fold_scale("raw"))
    for name, factor in {
        "W_enc": 1,
        "b_enc": 1 / into,
        "W_dec": into / out,
        "b_dec": 1 / out,
        "b_pre": 1 / into,
    }.items():
        np.testing.assert_allclose(new[name], old[name] * factor, rtol=1e-6)


@pytest.mark.parametrize("fold", ["raw", "decoder_norm", "pre_bias", "whitening"])
def test_a_gated_coder_keeps_both_of_its_paths(fold):
    coder = made("gated", normalization="scalar" if fold == "raw" else "none", pre_bias="own")
    coder = coder if fold != "whitening" else coder.fold_pre_bias()
    old, new, x = arrays(coder), arrays(FOLDS[fold](coder)), batch(coder)[0].double().numpy()
    mean, matrix, _ = (part.double().numpy() for part in whitener(6))
    y = {"raw": 0.48 * x, "whitening": (x - mean) @ matrix}.get(fold, x)

    def codes(t, y):
        seen = (y - t.get("b_pre", 0)) @ t["W_enc"].T
        return (seen + t["b_enc"] > 0) * positive(seen * np.exp(t["r_mag"]) + t["b_mag"])

    n = np.linalg.norm(old["W_dec"], axis=1)
    factor = {"raw": 1 / 0.48, "decoder_norm": n}.get(fold, 1)
    np.testing.assert_allclose(new["r_mag"], old["r_mag"])
    np.testing.assert_allclose(codes(new, x), codes(old, y) * factor, atol=2e-5)
    if fold == "decoder_norm":
        for name in ("b_enc", "b_mag"):
            np.testing.assert_allclose(new[name], old[name] * n, rtol=1e-5)


@pytest.mark.parametrize("units_", ["normalized", "raw"])
def test_a_threshold_on_h_times_n_is_divided_by_the_scale(units_):
    s = 0.48
    coder = made("calibrated", normalization="scalar", select_by_decoder_norm=True)
    folded = coder.fold_scale(units_)
    (cut,), (found,) = coder.spec.calibration, folded.spec.calibration
    assert found == pytest.approx(cut / s)
    assert folded.spec.select_by_decoder_norm
    old, new, x = arrays(coder), arrays(folded), batch(coder)[0].double().numpy()
    kept = []
    for t, y, threshold in ((old, s * x, cut), (new, x, found)):
        h = (y - t["b_pre"]) @ t["W_enc"].T + t["b_enc"]
        kept.append(h * np.linalg.norm(t["W_dec"], axis=1) / threshold)
    np.testing.assert_allclose(kept[1], kept[0], rtol=1e-4, atol=1e-5)


def test_a_calibrated_mutual_choice_becomes_a_threshold_of_each_latent():
    coder = made("calibrated", "cross_layer")
    folded, n = coder.fold_decoder_norm(), coder.decoder_norms().double().numpy()
    cuts = np.repeat(coder.spec.calibration, D_SAE // 3)
    np.testing.assert_allclose(arrays(folded)["threshold"], cuts * n, rtol=1e-6)


def test_whitening_is_the_formula_of_the_paper():
    mean, matrix, inverse = (part.double().numpy() for part in whitener(6))
    for pre_bias in ("none", "decoder"):
        coder = made("relu", pre_bias=pre_bias)
        old, new = arrays(coder), arrays(coder.fold_whitening(*whitener(6)))
        np.testing.assert_allclose(new["W_enc"].T, matrix @ old["W_enc"].T, atol=1e-6)
        shift = mean @ (matrix @ old["W_enc"].T) if pre_bias == "none" else 0
        np.testing.assert_allclose(new["b_enc"], old["b_enc"] - shift, atol=1e-6)
        np.testing.assert_allclose(new["W_dec"], old["W_dec"] @ inverse, atol=1e-5)
        np.testing.assert_allclose(new["b_dec"], old["b_dec"] @ inverse + mean, atol=1e-6)
