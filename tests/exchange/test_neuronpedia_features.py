"""Columns of a latent against the coder and the model themselves: logits, tokens, histograms, vectors, heads."""

from dataclasses import replace

import pytest
import torch
from rigs.interp_runs import prepare_apart, tiny_coder

from interp.evidence.promotes import token_text
from interp.evidence.tally import bin_edges
from interp.exchange.neuronpedia_features import BINS, Featured, activation_bars, logit_bars
from sae.coder.splicing import directions
from sae.lm.residual import residual_of


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    return prepare_apart(tiny_coder(folder), folder)


@pytest.fixture(scope="module")
def rows(prepared):
    """(latent, facts, row) of some latents."""
    lm, coder = prepared.subject.lm, prepared.subject.coder
    facts = [(latent, prepared.examples(latent).facts) for latent in prepared.latents.tolist()[:6]]
    made = Featured(lm, coder, residual_of(lm.model)).rows(facts)
    return [(*pair, row) for pair, row in zip(facts, made, strict=True)]


def test_logits_are_those_of_the_direction_through_norm_and_unembedding(prepared, rows):
    lm, coder = prepared.subject.lm, prepared.subject.coder
    for latent, facts, row in rows:
        direction = directions(coder, torch.tensor([latent]))[0].double()
        logits = lm.model.lm_head.weight.double() @ (lm.model.model.norm.weight.double() * direction)
        order = logits.argsort(descending=True)
        for name, ids in (("pos", order[:10]), ("neg", order.flip(0)[:10])):
            assert row[f"{name}_values"] == pytest.approx(logits[ids].tolist(), rel=1e-4)
            assert row[f"{name}_str"] == [token_text(lm.tokenizer, int(token)) for token in ids]
        assert tuple(row["pos_str"]) == facts.promoted
        assert tuple(row["neg_str"]) == facts.suppressed
        heights, middles = row["logits_hist_data_bar_heights"], row["logits_hist_data_bar_values"]
        assert (sum(heights), len(middles)) == (len(lm.tokenizer), BINS)
        counted, edges = torch.histogram(logits, BINS)
        assert heights == counted.int().tolist()
        assert middles == pytest.approx(((edges[1:] + edges[:-1]) / 2).tolist(), rel=1e-4)


def test_histogram_density_and_neighbors_are_those_of_the_evidence(rows):
    for _, facts, row in rows:
        assert sum(row["freq_hist_data_bar_heights"]) == facts.fired > 0
        assert row["frac_nonzero"] == facts.fired / facts.tokens
        assert row["maxActApprox"] == row["vectorDefaultSteerStrength"] == pytest.approx(facts.largest, rel=1e-5)
        assert row["freq_hist_data_bar_values"][-1] == pytest.approx(facts.largest, rel=0.25)  # in the same half octave
        assert row["topkCosSimIndices"] == [other for other, _ in facts.neighbors]
        assert row["topkCosSimValues"] == pytest.approx([cosine for _, cosine in facts.neighbors], rel=1e-5)


def test_the_vector_is_what_a_unit_adds_at_the_hook(prepared, rows):
    coder = prepared.subject.coder
    for latent, _, row in rows:
        direction = directions(coder, torch.tensor([latent]))[0]
        assert (row["hookName"], row["hasVector"]) == ("blocks.1.hook_resid_post", True)
        assert row["vector"] == pytest.approx(direction.tolist(), rel=1e-5)
        best = row["neuron_alignment_indices"]
        assert best == direction.topk(3).indices.tolist()
        assert row["neuron_alignment_values"] == pytest.approx(direction[best].tolist(), rel=1e-5)
        shares = (direction[best].abs() / direction.abs().sum()).tolist()
        assert row["neuron_alignment_l1"] == pytest.approx(shares, rel=1e-5)
        assert row["decoder_weights_dist"] == []


def test_a_coder_of_heads_tells_their_shares_and_one_of_no_hook_has_no_vector(prepared, rows):
    lm, coder = prepared.subject.lm, prepared.subject.coder
    featured = Featured(lm, coder, residual_of(lm.model))
    site = replace(coder.spec.writes[0], heads=4)
    featured.coder = type("Headed", (), {"spec": replace(coder.spec, writes=(site,), reads=(site,))})()
    featured.hook = None
    _, facts, _ = rows[0]
    vector = torch.arange(16, dtype=torch.float32)
    row = featured._row(3, facts, vector)
    norms = [float(vector[4 * head : 4 * head + 4].norm()) for head in range(4)]
    assert row["decoder_weights_dist"] == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-5)
    assert (row["vector"], row["hookName"], row["hasVector"]) == ([], None, False)


def test_a_latent_whose_direction_reaches_no_logits_has_none(prepared):
    lm, coder = prepared.subject.lm, prepared.subject.coder
    featured = Featured(lm, coder, residual_of(lm.model))
    facts = prepared.examples(int(prepared.latents[0])).facts
    featured.readout = None
    (row,) = featured.rows([(0, facts)])
    assert [row[name] for name in ("pos_str", "pos_values", "neg_str", "logits_hist_data_bar_values")] == [[]] * 4
    assert row.keys() == Featured(lm, coder, residual_of(lm.model)).rows([(0, facts)])[0].keys()


def test_bars_are_from_the_first_bin_that_holds_something_to_the_last():
    histogram = [0] * 48
    histogram[24], histogram[27] = 5, 7
    heights, middles = activation_bars(histogram)
    assert heights == [5, 0, 0, 7]
    assert middles == [1.25, 1.75, 2.5, 3.5]
    assert bin_edges()[24] == 1.0
    assert activation_bars([0] * 48) == ([], [])
    histogram[47] = 1
    assert activation_bars(histogram)[1][-1] == 2**11 * 1.75


def test_logits_that_are_all_alike_are_one_bar():
    assert logit_bars(torch.full((7,), 2.0)) == ([7], [2.0])
    heights, _ = logit_bars(torch.tensor([-1.0, 0.0, 1.0]))
    assert (heights[0], heights[-1], sum(heights)) == (1, 1, 3)
