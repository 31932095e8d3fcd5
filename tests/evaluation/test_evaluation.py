"""Evaluation with coders whose result is known (identity, zero, mean), and the mask in every arm."""

import pytest
import torch
from rigs.fakes import sampled_rows, tiny_lm, tiny_tokenizer
from transformers import BertConfig, BertModel

from sae.base.errors import ConfigError, Stopped
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.parts import cut, in_parts
from sae.coder.spec import CoderSpec
from sae.coder.splicing import splice
from sae.evaluation.evaluation import evaluate
from sae.lm.intervene import replace_at
from sae.lm.masking import MaskSpec
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.selection.topk import TopK

D, CONTEXT = 16, 12
SITE = Site("model.layers.1", model="tiny")
SIZES = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture
def lm():
    return tiny_lm()


@pytest.fixture
def rows(lm):
    return sampled_rows(lm, CONTEXT)


def coder(kind: str, site=SITE, mask=None, **spec) -> SparseCoder:
    """identity: latents +-x_i reconstruct x exactly; zero: nothing at all; other: an untrained coder."""
    mask = mask or MaskSpec((0, 1, 2), 1)
    width = {"reads": (site,), "writes": (site,), "pre_bias": "none", "mask": mask, "decoder_norm": "free"} | spec
    if kind == "random":
        made = SparseCoder(CoderSpec(D, D, 32, TopK(4), **width))
        initialize(made, torch.zeros(D), 0)
        return made
    made = SparseCoder(CoderSpec(D, D, 2 * D, TopK(D), **width))
    if kind == "identity":
        with torch.no_grad():
            made.W_enc.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
            made.W_dec.copy_(made.W_enc)
    return made


def test_the_identity_loses_nothing(lm, rows):
    found = evaluate(coder("identity"), lm, rows, 200)
    assert found["reconstruction"]["fvu"] < 1e-12
    assert found["reconstruction"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert found["reconstruction"]["l0"] == D
    loss = found["loss"]
    assert loss["ce_spliced"] == pytest.approx(loss["ce_clean"], abs=1e-6)
    assert loss["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert loss["kl_spliced"] == pytest.approx(0, abs=1e-6)
    assert loss["kl_score"] == pytest.approx(1, abs=1e-4)
    assert loss["ce_added"] == pytest.approx(0, abs=1e-6)


def test_the_zero_coder_is_zero_ablation(lm, rows):
    loss = evaluate(coder("zero"), lm, rows, 200)["loss"]
    assert loss["ce_spliced"] == loss["ce_zero"] != loss["ce_clean"]
    assert loss["ce_recovered"] == 0
    assert loss["kl_score"] == 0


def test_a_coder_that_gives_the_mean_is_mean_ablation(lm, rows):
    first = evaluate(coder("zero"), lm, rows, 240)
    keep = rows.data.gt(2) & (torch.arange(CONTEXT) > 0)
    with torch.no_grad():
        x = lm.model(rows.data.clamp_min(0).long(), output_hidden_states=True).hidden_states[2][keep]
    constant = coder("zero")
    with torch.no_grad():
        constant.b_dec.copy_(x.double().mean(0).float())
    found = evaluate(constant, lm, rows, 240)
    assert found["reconstruction"]["fvu"] == pytest.approx(1, abs=1e-6)
    assert found["reconstruction"]["tokens"] == int(keep.sum())
    assert found["loss"]["ce_spliced"] == pytest.approx(found["loss"]["ce_mean"], abs=1e-6)
    assert found["loss"]["ce_mean"] == pytest.approx(first["loss"]["ce_mean"], abs=1e-9)
    assert found["loss"]["ce_recovered_from_mean"] in (None, pytest.approx(0, abs=1e-4))


def test_losses_equal_those_of_the_model_over_the_masked_tokens(lm, rows):
    found = evaluate(coder("random"), lm, rows, 240)["loss"]
    ids = rows.data.clamp_min(0).long()
    with torch.no_grad():
        log_p = lm.model(ids).logits[:, :-1].double().log_softmax(-1)
    keep = (rows.data > 2)[:, :-1] & (torch.arange(CONTEXT - 1) > 0) & (rows.data[:, 1:] != -1)
    expected = -log_p.gather(-1, ids[:, 1:, None])[..., 0][keep].mean()
    assert found["tokens"] == int(keep.sum())
    assert found["ce_clean"] == pytest.approx(float(expected), abs=1e-6)
    assert found["ce_added"] == pytest.approx(found["ce_spliced"] - found["ce_clean"])
    assert found["kl_spliced"] > 0


def test_masked_positions_are_not_replaced(lm, rows):
    ids = rows.data[:2]
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    keep[0, 5] = True
    with torch.no_grad():
        clean = lm.model(ids.long()).logits
        with splice(lm.model, coder("zero"), keep):
            changed = lm.model(ids.long()).logits
    assert torch.equal(clean[1], changed[1])
    assert torch.equal(clean[0, :5], changed[0, :5])
    assert not torch.allclose(clean[0, 5:], changed[0, 5:])


def test_the_norm_filter_holds_in_every_arm_and_is_shown_both_ways(lm, rows):
    with torch.no_grad():
        x = lm.model(rows.data.clamp_min(0).long(), output_hidden_states=True).hidden_states[2]
    usual = (rows.data > 2) & (torch.arange(CONTEXT) > 0)
    limit = float(x[usual].norm(dim=1).quantile(0.8))
    made = coder("random", mask=MaskSpec((0, 1, 2), 1, {SITE.name: limit}))
    found = evaluate(made, lm, rows, 240)
    kept = usual & (x.norm(dim=-1) <= limit)
    assert found["reconstruction"]["tokens"] == int(kept.sum()) < int(usual.sum())
    assert found["reconstruction_unfiltered"]["tokens"] == int(usual.sum())
    assert found["loss"]["tokens"] == int((kept[:, :-1] & (rows.data[:, 1:] != -1)).sum())


def test_several_coders_at_several_sites_equal_each_alone(lm, rows):
    coders = {
        "a": coder("random"),
        "b": coder("identity", Site("model.layers.0.mlp", model="tiny")),
        "c": coder("zero", mask=MaskSpec((), 3)),
    }
    together = evaluate(coders, lm, rows, 200, nulls=True)
    for name, made in coders.items():
        assert together[name] == evaluate(made, lm, rows, 200, nulls=True)


def test_batches_change_nothing(lm, rows, monkeypatch):
    whole = evaluate(coder("random"), lm, rows, 240)
    monkeypatch.setattr("sae.evaluation.evaluation.PASS_LOGITS", 1)
    single = evaluate(coder("random"), lm, rows, 240)
    for part in ("reconstruction", "loss"):
        assert single[part] == pytest.approx(whole[part], rel=1e-5)


def test_progress_counts_every_pass_of_every_coder(lm, rows, monkeypatch, caplog):
    monkeypatch.setattr("sae.evaluation.evaluation.rows_per_pass", lambda context, vocabulary: 3)
    monkeypatch.setattr("sae.base.progress.SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO", logger="sae"):
        evaluate({"a": coder("random"), "b": coder("zero")}, lm, rows, 10 * CONTEXT)
    told = [line for line in caplog.messages if line.startswith("evaluating ") and "passes" in line]
    positions = [line.split()[1] for line in told if " in " not in line]
    assert positions == [f"{n}/12" for n in range(1, 13)]  # 4 batches, each read once and run for either coder


def test_a_coder_from_one_site_to_another_replaces_what_it_writes(lm, rows):
    read, write = Site("model.layers.1.mlp", "input", "tiny"), Site("model.layers.1.mlp", model="tiny")
    through = coder("identity", reads=(read,), writes=(write,))
    with torch.no_grad():
        target = lm.model.model.layers[1].mlp
        with splice(lm.model, through):
            spliced = lm.model(rows.data.clamp_min(0).long()).logits
        handle = target.register_forward_hook(lambda module, args, out: args[0])
        expected = lm.model(rows.data.clamp_min(0).long()).logits
        handle.remove()
    torch.testing.assert_close(spliced, expected)
    assert evaluate(through, lm, rows, 200)["reconstruction"]["fvu"] > 0.1  # an MLP is not the identity


def test_a_model_that_predicts_no_next_token_has_no_loss(rows):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = BertModel(BertConfig(**SIZES, vocab_size=len(tokenizer))).eval()
    encoder = LanguageModel(model, tokenizer, "tiny", None, False)
    found = evaluate(coder("identity", Site("encoder.layer.1", model="tiny")), encoder, rows, 200)
    assert "loss" not in found
    assert found["reconstruction"]["fvu"] < 1e-10


def test_nulls_bound_what_training_is_worth(lm, rows):
    found = evaluate(coder("random"), lm, rows, 240, nulls=True)["nulls"]
    assert 0 < found["pca"]["fvu"] < 1
    assert found["pca"]["l0"] == pytest.approx(4, abs=1)
    assert found["random_dictionary"]["fvu"] > found["pca"]["fvu"]


def test_refusals(lm, rows):
    with pytest.raises(ConfigError, match="its spec names no site"):
        evaluate(coder("zero", reads=(), writes=()), lm, rows)
    with pytest.raises(ConfigError, match=r"^coder: takes lm_head to have width 16; in tiny it has"):
        evaluate(coder("zero", Site("lm_head", model="tiny")), lm, rows)
    everything = MaskSpec(tuple(range(len(lm.tokenizer))), 0)
    with pytest.raises(ConfigError, match="its mask leaves none of the held-out tokens"):
        evaluate(coder("zero", mask=everything), lm, rows)
    with pytest.raises(Stopped, match="during evaluation"):
        evaluate(coder("zero"), lm, rows, should_stop=lambda: True)


def test_splicing_with_the_error_changes_nothing_until_latents_are_edited(lm, rows):
    made, ids = coder("random"), rows.data[:4].clamp_min(0).long()
    with torch.no_grad():
        clean = lm.model(ids).logits
        with splice(lm.model, made, error=True):
            kept = lm.model(ids).logits
        with splice(lm.model, made):
            spliced = lm.model(ids).logits
        after = lm.model(ids).logits
    torch.testing.assert_close(kept, clean, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(spliced, clean, atol=1e-2)
    assert torch.equal(after, clean)  # nothing stays behind


def test_a_coder_of_low_precision_changes_nothing_with_its_error_and_is_measured_on_the_true_target(lm, rows):
    made, ids = coder("random"), rows.data[:4].clamp_min(0).long()
    exact = evaluate(made, lm, rows, 240)["reconstruction"]["mse"]
    made = made.bfloat16()
    with torch.no_grad():
        clean = lm.model(ids).logits
        with splice(lm.model, made, error=True):
            torch.testing.assert_close(lm.model(ids).logits, clean, atol=1e-5, rtol=1e-5)
    rough = evaluate(made, lm, rows, 240)["reconstruction"]
    assert rough["mse"] != exact
    assert rough["mse"] == pytest.approx(exact, rel=0.05)


def test_the_error_term_is_a_constant_to_gradients(lm, rows):
    """With the error, d loss / d input at the site goes through the reconstruction only."""
    made, ids = coder("zero"), rows.data[:2].clamp_min(0).long()
    lm.model.requires_grad_(False)
    made.requires_grad_(True)
    with splice(lm.model, made, error=True):
        lm.model(ids).logits.sum().backward()
    assert made.b_dec.grad is not None
    assert made.b_dec.grad.abs().sum() > 0


def test_replace_at_both_sides(lm, rows):
    ids = rows.data[:2].clamp_min(0).long()
    with torch.no_grad():
        expected = lm.model(ids, output_hidden_states=True).hidden_states[1]
        with replace_at(lm.model, Site("model.layers.1", "input"), lambda x: 0 * x):
            first = lm.model(ids).logits
        with replace_at(lm.model, Site("model.layers.0"), lambda x: x - expected):
            second = lm.model(ids).logits
    torch.testing.assert_close(first, second)


def test_a_coder_in_parts_has_the_same_figures(lm, rows):
    whole = coder("random")
    parts = in_parts(whole, cut(whole.spec, [(torch.device("cpu"), 1), (None, 2)]), whole.device, whole.dtype)
    figures = evaluate({"whole": whole, "parts": parts}, lm, rows, tokens=60, progress=False)
    plain, other = figures["whole"], figures["parts"]
    assert plain.keys() == other.keys()
    for group in ("reconstruction", "loss"):
        for name, value in plain[group].items():
            assert other[group][name] == pytest.approx(value, rel=1e-4), (group, name)
    assert other["density"] == plain["density"]
