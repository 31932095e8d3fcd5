"""Transcoders, skip transcoders, crosscoders, cross-layer coders, two models, attention outputs: each against a
plain reference, and spliced into a language model with coders whose result is known.
"""

import pytest
import torch
from rigs.fakes import sampled_rows, tiny_lm

from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.coder.splicing import reads_ahead, splice
from sae.evaluation.evaluation import evaluate
from sae.evaluation.metrics import fvu
from sae.evaluation.tables import table
from sae.lm.hooks import capture
from sae.lm.intervene import ablate
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.objectives.auxk import AuxK
from sae.objectives.reconstruction import Reconstruction
from sae.selection import Budget, trainable
from sae.selection.feature_choice import FeatureChoice
from sae.selection.gradient_topk import GradientTopK
from sae.selection.jumprelu import JumpReLU
from sae.selection.matching_pursuit import MatchingPursuit
from sae.selection.mutual_choice import MutualChoice
from sae.selection.topk import TopK
from sae.training.beginning import new_coder
from sae.training.choosing import Chooser
from sae.training.config import CoderConfig
from sae.training.measuring import Recipe, measure
from sae.training.optim import OptimConfig
from sae.training.planning import site_pairs
from sae.training.step import Batch
from sae.training.trainer import CoderTrainer, Schedule

D = 16
MASK = MaskSpec((0, 1, 2), 1)
READS = tuple(Site(f"model.layers.{i}.mlp", "input", "tiny", width=D) for i in range(3))
WRITES = tuple(Site(f"model.layers.{i}.mlp", model="tiny", width=D) for i in range(3))
RESIDUAL = tuple(Site(f"model.layers.{i}", model="tiny", width=D) for i in range(3))


@pytest.fixture
def lm():
    return tiny_lm()


@pytest.fixture
def rows(lm):
    return sampled_rows(lm)


def shaken(coder, amount=0.3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=draw).to(parameter))
    return coder


def cross_layer(rule, m=8, d=4, layers=3, dtype=torch.float64, **spec):
    sites = [tuple(Site(f"{side}{i}", width=d) for i in range(layers)) for side in "rw"]
    made = SparseCoder(
        CoderSpec(
            layers * d,
            layers * d,
            layers * m,
            rule,
            *sites,
            cross_layer=True,
            **{"pre_bias": "own", "decoder_norm": "free", "variance": 1.0} | spec,
        ),
        dtype=dtype,
    )
    return shaken(made)


def layer_outputs(coder, x, codes):
    """The definition: y_l' = sum over l <= l' of W_dec^(l -> l') z^l + b."""
    layers, d, m = coder.spec.n_blocks, coder.W_dec.shape[1], coder.spec.d_sae // coder.spec.n_blocks
    out, row = coder.b_dec.expand(len(x), -1).clone(), 0
    for layer in range(layers):
        for latent in range(m):
            for target in range(layer, layers):
                code = codes[:, layer * m + latent]
                out[:, target * d : (target + 1) * d] += code[:, None] * coder.W_dec[row]
                row += 1
    assert row == len(coder.W_dec), "no row is left over: no stored zeros"
    return out


@pytest.mark.parametrize("rule", [TopK(2), JumpReLU(0.4, 0.2), MutualChoice(2)], ids=lambda r: type(r).__name__)
def test_a_cross_layer_coder_equals_its_definition(rule):
    coder = cross_layer(rule)
    x = torch.randn(10, 12).double()
    y = x - coder.b_pre
    scores = torch.cat([y[:, 4 * i : 4 * i + 4] @ coder.W_enc[8 * i : 8 * i + 8].T for i in range(3)], 1) + coder.b_enc
    torch.testing.assert_close(coder.scores(x), scores)
    out, latents = coder(x)
    codes = latents.to_dense()
    if isinstance(rule, TopK):
        assert (codes != 0).view(10, 3, 8).sum(2).max() <= 2, "k in every layer"
    torch.testing.assert_close(codes, torch.where(codes != 0, scores, 0.0), check_dtype=False)
    torch.testing.assert_close(out, layer_outputs(coder, x, codes))
    torch.testing.assert_close(coder.decode(latents, x), out)


def test_its_gradients_equal_dense_autograd():
    coder = cross_layer(TopK(2))
    x = torch.randn(6, 12).double()
    support = coder.encode(x).to_dense() != 0
    coder(x).out.square().sum().backward()
    ours = {name: p.grad.clone() for name, p in coder.named_parameters()}
    coder.zero_grad()
    y = x - coder.b_pre
    scores = torch.cat([y[:, 4 * i : 4 * i + 4] @ coder.W_enc[8 * i : 8 * i + 8].T for i in range(3)], 1) + coder.b_enc
    layer_outputs(coder, x, (scores * support).relu()).square().sum().backward()
    for name, parameter in coder.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, msg=name)


def test_shared_budgets_are_spent_where_they_do_most():
    coder = cross_layer(TopK(2), budget="shared")
    x = torch.randn(10, 12).double()
    codes = coder.encode(x).to_dense() != 0
    counts = codes.view(10, 3, 8).sum(2)
    assert codes.sum(1).max() <= 6
    assert counts.max() > 2, "some layer takes more than its share"


@pytest.mark.parametrize("rule", [MutualChoice(2), FeatureChoice(2)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("budget", ["block", "shared"])
def test_batch_wide_budgets_per_block_or_shared(rule, budget):
    coder = cross_layer(rule, budget=budget)
    x = torch.randn(20, 12).double()
    chooser = Chooser(coder)
    chooser.begin(0.0, 20)
    (found,) = chooser.whole_batch([coder.look(x)])
    ids = found.by_rule.ids
    blocks = torch.bincount(torch.div(ids, 8, rounding_mode="floor"), minlength=3)
    assert int(blocks.sum()) == 2 * 20 * 3
    assert (blocks == 40).all() == (budget == "block")
    chooser.finish()
    numbers, thresholds = chooser.calibrated()
    assert (len(numbers) == (3 if budget == "block" else 1)) or thresholds.shape == (24,)


def pairs_of(n=4000, d_in=6, d_out=4, seed=0):
    """A target that few latents of the input predict, beside a linear part."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=draw) + 0.5
    hidden = torch.relu(x @ torch.randn(d_in, 12, generator=draw) - 1)
    return x, hidden @ torch.randn(12, d_out, generator=draw) + x @ torch.randn(d_in, d_out, generator=draw) + 3.0


def transcoder(x, y, steps=150, **config):
    sites = (Site("a"),), (Site("b"),)
    settings = CoderConfig(**{"d_sae": 32, "selection": TopK(4)} | config)
    normalization = settings.normalization
    found = measure({"a": x, "b": y}, *sites, MaskSpec(), Recipe(normalization, 0.0))
    terms = {"reconstruction": Reconstruction(), "auxk": AuxK(k=4)}
    return CoderTrainer(new_coder(settings, found), terms, OptimConfig(lr=1e-2), Schedule(steps, 500))


def test_a_transcoder_starts_at_the_mean_output_without_a_norm_constraint():
    x, y = pairs_of()
    made = transcoder(x, y)
    coder = made.coder
    assert (coder.spec.d_in, coder.spec.d_out) == (6, 4)
    assert (coder.W_dec == 0).all()
    torch.testing.assert_close(coder.b_dec.detach(), y.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(coder.b_pre.detach(), x.mean(0), atol=1e-4, rtol=1e-4)
    assert coder.spec.decoder_norm == "free"
    assert fvu(y, coder(x).out) == pytest.approx(1.0, abs=1e-5)
    for step in range(150):
        made.step(Batch(x[step % 8 * 500 :][:500], y[step % 8 * 500 :][:500]), step)
    assert fvu(y, made.trained()(x).out) < 0.4
    assert made.coder.W_dec.detach().norm(dim=1).std() > 0.05


def test_without_a_bias_of_its_own_the_encoder_starts_centered():
    x, y = pairs_of()
    coder = transcoder(x, y, pre_bias="none").coder
    assert coder.scores(x).mean(0).abs().max() < 1e-4


def test_dead_latents_of_a_transcoder_are_revived():
    x, y = pairs_of()
    made = transcoder(x, y)
    with torch.no_grad():
        made.coder.b_enc[:16] = -3.0
    for step in range(150):
        made.step(Batch(x[step % 8 * 500 :][:500], y[step % 8 * 500 :][:500]), step)
    assert made.active_steps["auxk"] > 0
    with_aux = int((made.tokens_since_fired[:16] < 500).sum())
    plain = transcoder(x, y)
    plain.objectives.pop("auxk")
    with torch.no_grad():
        plain.coder.b_enc[:16] = -3.0
    for step in range(150):
        plain.step(Batch(x[step % 8 * 500 :][:500], y[step % 8 * 500 :][:500]), step)
    assert with_aux > int((plain.tokens_since_fired[:16] < 500).sum())


def test_a_skip_path_of_zeros_changes_nothing_and_a_trained_one_explains_more():
    x, y = pairs_of()
    normalization = Normalization("scalar")
    plain, skip = (transcoder(x, y, normalization=normalization, skip=s) for s in (False, True))
    weights = torch.randn(plain.coder.W_dec.shape)
    with torch.no_grad():  # the start of all zeros would say nothing
        for made in (plain, skip):
            made.coder.W_dec.copy_(weights)
    assert torch.equal(plain.coder(x).out, skip.coder(x).out)
    assert not torch.equal(plain.coder(x).out, plain.coder(x + 1).out)
    for step in range(90):
        batch = Batch(x[step % 6 * 500 :][:500], y[step % 6 * 500 :][:500])
        plain.step(batch, step)
        skip.step(batch, step)
    fresh_x, fresh_y = x[3000:], y[3000:]
    assert fvu(fresh_y, skip.trained()(fresh_x).out) < fvu(fresh_y, plain.trained()(fresh_x).out)


def test_what_fills_a_buffer_up_is_decoded_to_nothing():
    """Also where the last layer comes to have as many entries as if it had them all, in order."""
    coder = cross_layer(TopK(2))  # three layers of 8 latents
    ids = torch.tensor([1, 9, 18, 20, *[23] * 6])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, *[0.0] * 6], dtype=torch.float64)
    made = coder.decoded(values, torch.tensor([0, 10]), ids)
    torch.testing.assert_close(made, coder.decoded(values[:4], torch.tensor([0, 4]), ids[:4]))


def test_a_cross_layer_coder_of_one_layer_is_a_transcoder():
    x, y = pairs_of()
    one, other = transcoder(x, y), transcoder(x, y, layout="cross_layer")
    assert other.coder.spec.cross_layer
    for step in range(30):
        batch = Batch(x[step % 8 * 500 :][:500], y[step % 8 * 500 :][:500])
        assert one.step(batch, step) == other.step(batch, step)
    for name, weight in one.coder.state_dict().items():
        assert torch.equal(weight, other.coder.state_dict()[name]), name


def test_per_token_normalization_of_a_transcoder_is_refused():
    with pytest.raises(ConfigError, match=r"normalization\.kind: 'l2'.*takes none or scalar"):
        CoderSpec(4, 6, 8, TopK(2), pre_bias="own", normalization=Normalization("l2"))


def test_a_crosscoder_normalizes_its_sites_apart_and_is_one_coder():
    sites = (Site("a", width=3), Site("b", width=5))
    activations = {"a": torch.randn(500, 3) * 9 + 1, "b": torch.randn(500, 5) * 0.1 - 2}
    for kind in ("none", "scalar", "layer_norm", "l2"):
        found = measure(activations, sites, sites, MaskSpec(), Recipe(Normalization(kind), 0.0))
        coder = shaken(new_coder(CoderConfig(d_sae=16, selection=TopK(4), normalization=Normalization(kind)), found))
        x = torch.cat([activations["a"], activations["b"]], 1)
        y, how = coder.spec.normalize(x)
        torch.testing.assert_close(y * how[1] + how[0], x)
        if kind != "none":
            first = Normalization(kind, found.reads[0].scale).apply(activations["a"])[0]
            torch.testing.assert_close(y[:, :3], first)
        torch.testing.assert_close(coder.spec.normalize_target(x), y)
        out, latents = coder(x)
        torch.testing.assert_close(coder.decode(latents, x), out)


def seen_by(lm, rows, sites):
    seen = capture(lm, list(sites), rows.data)
    keep = (rows.data > 2) & (torch.arange(rows.context_length) > 0)
    return {name: x[keep] for name, x in seen.items()}, keep


def constant(reads, writes, mean, **spec):
    """A coder of no latents that matter: it always gives `mean`."""
    n = len(reads)
    coder = SparseCoder(
        CoderSpec(
            n * D,
            n * D,
            8 * n,
            TopK(1),
            reads,
            writes,
            **{"pre_bias": "none", "decoder_norm": "free", "mask": MASK} | spec,
        )
    )
    with torch.no_grad():
        coder.b_dec.copy_(mean)
    return coder


@pytest.mark.parametrize("cross", [True, False])
def test_a_coder_of_all_mlps_that_gives_the_mean_is_mean_ablation_of_all(lm, rows, cross):
    seen, _ = seen_by(lm, rows, WRITES)
    mean = torch.cat([seen[site.name].mean(0) for site in WRITES])
    found = evaluate(constant(READS, WRITES, mean, cross_layer=cross), lm, rows, 240)
    assert found["loss"]["ce_spliced"] == pytest.approx(found["loss"]["ce_mean"], abs=1e-5)
    zero = evaluate(constant(READS, WRITES, torch.zeros(3 * D), cross_layer=cross), lm, rows, 240)
    assert zero["loss"]["ce_spliced"] == pytest.approx(zero["loss"]["ce_zero"], abs=1e-5)
    assert zero["loss"]["ce_zero"] != pytest.approx(zero["loss"]["ce_clean"], abs=1e-2)


def identity(sites, **spec):
    d = sum(site.width for site in sites)
    rule = TopK(d)
    coder = SparseCoder(
        CoderSpec(d, d, 2 * d, rule, sites, sites, pre_bias="none", decoder_norm="free", mask=MASK, **spec)
    )
    with torch.no_grad():
        coder.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        coder.W_dec.copy_(coder.W_enc)
    return coder


def test_the_identity_crosscoder_loses_nothing(lm, rows):
    found = evaluate(identity(RESIDUAL), lm, rows, 240)
    assert found["reconstruction"]["fvu"] < 1e-10
    assert found["loss"]["ce_spliced"] == pytest.approx(found["loss"]["ce_clean"], abs=1e-5)
    assert found["loss"]["ce_recovered"] == pytest.approx(1.0, abs=1e-4)


def test_a_crosscoder_needs_its_inputs_given(lm):
    with pytest.raises(ConfigError, match="pass what it reads as given"), splice(lm.model, identity(RESIDUAL)):
        pass


def test_a_cross_layer_coder_sees_earlier_layers_replaced(lm, rows):
    """Spliced layer by layer, each block reads what the model computes with the earlier predictions in place."""
    coder = shaken(constant(READS, WRITES, torch.zeros(3 * D), cross_layer=True, pre_bias="own"))
    tokens = rows.data.clamp_min(0).long()
    read: dict[str, torch.Tensor] = {}
    with torch.no_grad(), splice(lm.model, coder):
        patched = capture_all(lm, tokens, read)
    inputs = torch.cat([read[site.name] for site in READS], -1)
    out = coder(inputs).out
    for i, site in enumerate(WRITES):
        torch.testing.assert_close(read[site.name], out[..., i * D : (i + 1) * D], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(patched, lm.model(tokens).logits)


def capture_all(lm, tokens, into):
    from sae.lm.hooks import hooked

    with hooked(lm.model, [*READS, *WRITES], lambda site, x: into.update({site.name: x})):
        return lm.model(tokens).logits


def test_the_share_of_the_skip_path_alone(lm, rows):
    """With a least-squares skip path and silent latents, that path explains all that is explained."""
    seen, _ = seen_by(lm, rows, (READS[1], WRITES[1]))
    x, y = seen[READS[1].name], seen[WRITES[1].name]
    coder = constant((READS[1],), (WRITES[1],), torch.zeros(D), skip=True)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    with torch.no_grad():
        coder.W_skip.copy_(solution[:-1].T)
        coder.b_dec.copy_(solution[-1])
    found = evaluate(coder, lm, rows, 240, nulls=True)
    assert found["skip"]["ev"] == pytest.approx(found["reconstruction"]["ev"], abs=1e-6)
    assert 0 < found["skip"]["ev"] < 1
    assert found["nulls"]["linear_map"]["fvu"] < 1.5


def test_a_transcoder_is_set_beside_the_autoencoder_of_its_target(lm, rows):
    coders = {"tc": constant((READS[1],), (WRITES[1],), torch.zeros(D)), "sae": identity((WRITES[1],))}
    found = evaluate(coders, lm, rows, 240)
    assert found["tc"]["against"]["sae"]["ce_ratio"] == pytest.approx(
        found["tc"]["loss"]["ce_spliced"] / found["sae"]["loss"]["ce_spliced"]
    )
    assert "against" not in found["sae"]


def test_heads_that_do_not_divide_the_columns_cost_no_other_figure(lm, rows):
    """Runs of older versions may have saved another module's number of heads."""
    (pair,) = paired_of(lm, ["blocks.1.attn.hook_z"])
    found = evaluate(identity((Site(**{**pair[0].__dict__, "width": D, "heads": 5}),)), lm, rows, 240)
    assert found["heads"] == {"not_available": f"{D} columns are not 5 heads of one width"}
    assert found["loss"]["ce_recovered"] == pytest.approx(1.0, abs=1e-4)
    assert ("decoder share by head", f"not available: {D} columns are not 5 heads of one width") in table(found)


def test_what_can_be_read_but_not_replaced_is_measured_without_its_loss(lm, rows):
    (pair,) = paired_of(lm, ["blocks.1.ln2.hook_normalized"])
    found = evaluate(identity((Site(**{**pair[0].__dict__, "width": D}),)), lm, rows, 240)
    assert found["reconstruction"]["fvu"] == pytest.approx(0, abs=1e-6)
    assert "loss" not in found
    assert table(found)


def test_attention_outputs_by_head(lm, rows):
    (pair,) = paired_of(lm, ["blocks.1.attn.hook_z"])
    site = Site(**{**pair[0].__dict__, "width": D})
    assert (site.hook, site.side, site.heads) == ("model.layers.1.self_attn.o_proj", "input", 2)
    made = identity((site,))
    found = evaluate(made, lm, rows, 240)
    assert found["loss"]["ce_recovered"] == pytest.approx(1.0, abs=1e-4)
    heads = found["heads"]
    assert sum(heads["mean_share"]) == pytest.approx(1.0)
    assert heads["dominant"] == 1.0, "each latent of the identity writes in one coordinate"
    assert heads["heads_per_latent"] == pytest.approx(1.0)
    with torch.no_grad():
        made.W_dec.copy_(torch.ones_like(made.W_dec))
    spread = evaluate(made, lm, rows, 240)["heads"]
    assert spread["mean_share"] == pytest.approx([0.5, 0.5])
    assert spread["heads_per_latent"] == pytest.approx(2.0)
    with torch.no_grad():
        made.W_dec[:, D // 2 :] = 0.0  # the columns of the second head
    assert evaluate(made, lm, rows, 240)["heads"]["mean_share"] == pytest.approx([1.0, 0.0])
    assert evaluate(made, lm, rows, 240)["heads"]["dominant"] == 1.0
    with torch.no_grad():
        made.W_dec.zero_()
        made.b_dec.zero_()
    none = evaluate(made, lm, rows, 240)["loss"]
    assert none["ce_spliced"] == none["ce_zero"] != none["ce_clean"]
    assert none["ce_recovered"] == 0


def paired_of(lm, sites, targets=()):
    from types import SimpleNamespace

    settings = SimpleNamespace(activations=SimpleNamespace(sites=tuple(sites), targets=tuple(targets)))
    return site_pairs(settings, lm)  # type: ignore[arg-type]


def test_sites_and_targets_are_paired_in_order(lm):
    pairs = paired_of(lm, ["layers.*.mlp:input"], ["layers.*.mlp"])
    assert [(r.name, w.name) for r, w in pairs] == [(r.name, w.name) for r, w in zip(READS, WRITES, strict=True)]
    with pytest.raises(ConfigError, match=r"activations\.targets: 'layers\.1\.mlp' names 1 sites"):
        paired_of(lm, ["layers.*.mlp:input"], ["layers.1.mlp"])
    with pytest.raises(ConfigError, match=r"activations\.targets: no module 'layers\.7\.mlp'"):
        paired_of(lm, ["layers.0"], ["layers.7.mlp"])


def test_a_crosscoder_of_two_models_is_spliced_into_each(lm, rows):
    other = tiny_lm(seed=5)
    sites = tuple(Site("model.layers.1", model="tiny", tag=tag, width=D) for tag in ("", "second"))
    assert [site.name for site in sites] == ["model.layers.1", "model.layers.1@second"]
    found = evaluate(identity(sites), lm, rows, 240, second=other)
    assert found["reconstruction"]["fvu"] < 1e-10
    for key in ("loss", "loss_second"):
        assert found[key]["ce_spliced"] == pytest.approx(found[key]["ce_clean"], abs=1e-5)
    assert found["loss"]["ce_clean"] != found["loss_second"]["ce_clean"]
    half = identity(sites)
    with torch.no_grad():
        half.W_dec[:, D:] = 0.0  # nothing is written in the second model
    broken = evaluate(half, lm, rows, 240, second=other)
    assert broken["loss"]["ce_spliced"] == pytest.approx(found["loss"]["ce_clean"], abs=1e-5)
    assert broken["loss_second"]["ce_spliced"] == pytest.approx(broken["loss_second"]["ce_zero"], abs=1e-5)


def test_ablating_several_sites_at_once(lm, rows):
    tokens = rows.data.clamp_min(0).long()
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad(), ablate(lm.model, WRITES[:2]):
        capture_all(lm, tokens, seen)
    assert seen[WRITES[0].name].abs().max() == 0 == seen[WRITES[1].name].abs().max()
    assert seen[WRITES[2].name].abs().max() > 0


BAD_SPECS = [
    ({"reads": READS[:2]}, "cross_layer: 2 sites read and 3 written"),
    ({"d_sae": 25}, "d_sae: 25 latents cannot be shared equally by 3 layers"),
    (
        {"encoder": "matching_pursuit", "selection": MatchingPursuit()},
        "encoder: 'matching_pursuit' does not go with cross_layer",
    ),
    ({"pre_bias": "decoder"}, "pre_bias: 'decoder' does not go with cross_layer"),
    ({"d_in": 47}, "d_in: 47 is not the sum of the sites' widths 16"),
    ({"budget": "all"}, "budget: 'all' is not one of block, shared"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SPECS, ids=str)
def test_specs_that_cannot_be_are_refused(changes, message):
    fields = {"d_in": 48, "d_out": 48, "d_sae": 24, "selection": TopK(2), "reads": READS, "writes": WRITES}
    if "reads" in changes:
        fields["d_in"] = 32
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        CoderSpec(**{**fields, "pre_bias": "own", "cross_layer": True} | changes)


def test_the_start_is_tied_for_crosscoders_and_zero_for_transcoders():
    cross = SparseCoder(CoderSpec(2 * D, 2 * D, 64, TopK(4), RESIDUAL[:2], RESIDUAL[:2]))
    initialize(cross, torch.zeros(2 * D), 0)
    assert torch.equal(cross.W_enc, cross.W_dec)
    torch.testing.assert_close(cross.decoder_norms(), torch.ones(64))


def test_a_splice_begins_anew_with_every_pass(lm):
    """Inputs that a transcoder has read of one text are not those of the next, nor of its length."""
    coder = shaken(SparseCoder(CoderSpec(D, D, 32, TopK(4), READS[1:2], WRITES[1:2], pre_bias="own")))
    cross = SparseCoder(CoderSpec(3 * D, 3 * D, 48, TopK(2), READS, WRITES, pre_bias="own", cross_layer=True))
    texts = [torch.randint(3, 200, (2, length)) for length in (9, 9, 5)]
    for made in (coder, shaken(cross)):
        with torch.no_grad():
            alone = []
            for tokens in texts:
                with splice(lm.model, made):
                    alone.append(lm.model(tokens).logits)
            with splice(lm.model, made):
                for tokens, expected in zip(texts, alone, strict=True):
                    torch.testing.assert_close(lm.model(tokens).logits, expected)


def test_what_reads_ahead_is_what_competes_over_layers():
    def spec(rule, budget, calibration=()):
        made = CoderSpec(3 * D, 3 * D, 48, rule, READS, WRITES, "linear", "own", cross_layer=True, budget=budget)
        return made.with_(calibration=calibration)

    for rule in trainable().values():
        made = rule(k=2) if "k" in rule.__dataclass_fields__ else rule()
        assert not reads_ahead(spec(made, "block")), rule
        expected = isinstance(made, Budget) and rule is not FeatureChoice
        assert reads_ahead(spec(made, "shared")) == expected, rule
    assert not reads_ahead(spec(MutualChoice(2), "shared", (0.5,)))
    assert reads_ahead(spec(GradientTopK(2), "shared", (0.5,))), "its calibration is no threshold"


@pytest.mark.parametrize("budget", ["block", "shared"])
@pytest.mark.parametrize("rule", trainable())
def test_a_spliced_cross_layer_coder_puts_out_what_it_makes_of_its_true_inputs(lm, rule, budget):
    """At the first site written nothing before it has changed, so the inputs are those of the model as it is."""
    kind = trainable()[rule]
    made = SparseCoder(
        CoderSpec(
            3 * D,
            3 * D,
            48,
            kind(k=2) if "k" in kind.__dataclass_fields__ else kind(),
            READS,
            WRITES,
            pre_bias="own",
            cross_layer=True,
            budget=budget,
        )
    )
    made = shaken(made).requires_grad_(False)
    if rule == "feature_choice":
        made.threshold.fill_(0.3)
    tokens, seen, spliced = torch.randint(3, 200, (2, 9)), {}, {}
    with torch.no_grad():
        capture_all(lm, tokens, seen)
        given = {name: x.clone() for name, x in seen.items()}
        inputs = torch.cat([given[site.name] for site in READS], dim=-1)
        with splice(lm.model, made, given=given if reads_ahead(made.spec) else None):
            capture_all(lm, tokens, spliced)
    torch.testing.assert_close(spliced[WRITES[0].name], made(inputs).out[..., :D], atol=1e-5, rtol=1e-4)
