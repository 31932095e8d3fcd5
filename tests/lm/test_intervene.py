"""Directions that are added, and the strength at which they change a model by a given amount."""

import math

import pytest
import torch
from rigs.fakes import tiny_lm
from transformers import GPT2Config, GPT2LMHeadModel

from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.coder.splicing import directions
from sae.lm.hooks import capture
from sae.lm.intervene import Matched, add, matched_strength, next_logits
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.selection.topk import TopK
from sae.text.packing import PADDING

D = 16


def test_a_direction_is_added_at_the_kept_positions_of_every_site():
    lm = tiny_lm()
    tokens = torch.tensor([[0, 40, 41, 42], [0, 50, 51, 52]])
    sites = [Site("model.layers.0.mlp", width=D), Site("model.layers.0.self_attn.o_proj", "input", width=D)]
    other = Site("model.layers.0", tag="second", width=D)
    keep = torch.tensor([[False, False, True, False], [False, False, False, True]])
    direction = torch.randn(3 * D)
    clean = capture(lm, sites, tokens)
    with add(lm.model, [*sites, other], direction, keep):
        seen = capture(lm, [sites[1]], tokens)  # the attention comes first: nothing else has been changed
    assert torch.allclose(seen[sites[1].name] - clean[sites[1].name], keep[..., None] * direction[D : 2 * D], atol=1e-5)
    with torch.no_grad():
        plain = lm.model(tokens).logits
        with add(lm.model, [*sites, other], torch.zeros(3 * D), keep):
            assert torch.equal(lm.model(tokens).logits, plain)
        with add(lm.model, sites[:1], direction[:D], keep):
            changed = lm.model(tokens).logits
        assert torch.equal(lm.model(tokens).logits, plain), "nothing is left behind"
    assert torch.equal(changed[:, :2], plain[:, :2])
    assert not torch.allclose(changed[0, 2], plain[0, 2])


def test_written_rows_are_what_decoding_one_latent_adds():
    sites = [tuple(Site(f"{side}{i}", width=4) for i in range(3)) for side in "rw"]
    layered = CoderSpec(12, 12, 6, TopK(1), *sites, cross_layer=True, pre_bias="none", decoder_norm="free")
    site = (Site("x"),)
    scaled = CoderSpec(4, 4, 6, TopK(1), site, site, normalization=Normalization("scalar", 0.25))
    across = CoderSpec(
        4, 8, 6, TopK(1), site, (Site("a", width=4), Site("b", width=4, scale=3.0)), pre_bias="none",
        normalization=Normalization("scalar", 2.0),
    )  # fmt: skip
    for spec in (layered, scaled, across):
        coder = SparseCoder(spec)
        with torch.no_grad():
            for parameter in coder.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        chosen = torch.tensor([5, 0, 3])
        latents = coder.encode(torch.randn(1, spec.d_in))
        for latent, row in zip(chosen.tolist(), directions(coder, chosen), strict=True):
            one = type(latents)(torch.tensor([0, 1]), torch.tensor([latent]), torch.tensor([1.0]), spec.d_sae)
            none = one.with_values(torch.zeros(1))
            x = torch.randn(1, spec.d_in)
            assert torch.allclose(row, (coder.decode(one, x) - coder.decode(none, x))[0], atol=1e-5)
    per_token = SparseCoder(CoderSpec(4, 4, 6, TopK(1), site, site, normalization=Normalization("layer_norm")))
    with torch.no_grad():
        per_token.W_dec.copy_(torch.randn(6, 4))
    assert torch.equal(directions(per_token, chosen), per_token.W_dec[chosen])
    assert torch.equal(per_token.decoder_rows(chosen), per_token.W_dec[chosen])


def gpt2():
    config = GPT2Config(vocab_size=60, n_embd=D, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    return LanguageModel(model, tiny_lm().tokenizer, "gpt2", None, True)


@pytest.mark.parametrize("lm", [tiny_lm, gpt2])
def test_next_logits_are_those_of_each_row_alone(lm):
    lm = lm()
    rows = [[3, 40, 41], [3, 50, 51, 52, 53, 20], [9]]
    tokens = torch.full((3, 8), PADDING)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = torch.tensor(row)
    found = next_logits(lm, tokens, torch.tensor([3, 6, 1]))
    for row, logits in zip(rows, found, strict=True):
        assert torch.allclose(logits, lm.model(torch.tensor([row])).logits[0, -1], atol=1e-4)
    assert lm.model(tokens.clamp_min(0)).logits.shape[1] == 8, "nothing is left behind"


CURVES = {
    "square": lambda s: s * s,
    "small": lambda s: 1e-7 * s * s,
    "large": lambda s: 1e6 * s * s,
    "saturates": lambda s: 3 * s * s / (1 + s * s),
    "late": lambda s: 1e-4 * s * s + (s / 30) ** 8,
    "steep": lambda s: math.expm1(min(s, 700)) * 1e-3,
    "overflows": lambda s: s * s if s < 40 else math.nan,
    "rounds": lambda s: round(s * s, 2) if s > 0.05 else -1e-9,
}


@pytest.mark.parametrize("start", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("target", [0.1, 1.0])
def test_the_strength_is_found_in_ten_steps(name, start, target):
    calls = []

    def measure(strength):
        calls.append(strength)
        return CURVES[name](strength)

    found = matched_strength(measure, target, start)
    assert found.reached
    assert abs(found.kl - target) <= 0.1 * target
    assert found.kl == CURVES[name](found.strength)
    assert len(calls) <= 10


def test_what_cannot_be_reached_is_said():
    flat = matched_strength(lambda s: 0.3 * s / (1 + s), 1.0, 1.0)
    assert not flat.reached
    assert flat.kl == pytest.approx(0.3, rel=0.01), "the nearest there is"
    jump = matched_strength(lambda s: 0.01 if s < 7 else 5.0, 1.0, 1.0)
    assert not jump.reached
    assert matched_strength(lambda s: math.nan, 1.0, 1.0) == Matched(0.0, 0.0, False)
    assert matched_strength(lambda s: s, 1.0, 1.0, steps=1).reached
