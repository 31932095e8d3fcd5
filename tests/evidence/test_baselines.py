"""Baselines: what each of them is, that it fires as often as it says, and that it goes through the same pipeline."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rigs.fakes import tiny_lm

from interp.evidence.baselines import BASELINES, activation_sample, baseline_coder
from interp.evidence.codes import encode_rows, read_activations
from interp.evidence.subject import Subject
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.loading import hub
from sae.selection.jumprelu import JumpReLU
from sae.selection.topk import TopK
from sae.text.packing import PADDING

D = 16
SITE = Site("model.layers.1", model="tiny", width=D)
MASK = MaskSpec((0, 1, 2), 1, {"model.layers.1": 1e6, "elsewhere": 1.0})


def trained(kind="topk", seed=0):
    """Coders as training leaves them: with biases, uneven firing and dead latents."""
    common = {
        "mask": MASK,
        "context_length": 64,
        "training": {"text": {"source": "x"}, "seed": 3},
        "metrics": {"fvu": 1},
    }
    if kind == "topk":
        spec = CoderSpec(D, D, 40, TopK(5), (SITE,), (SITE,), normalization=Normalization("layer_norm"), **common)
    elif kind == "jumprelu":
        spec = CoderSpec(D, D, 40, JumpReLU(), (SITE,), (SITE,), pre_bias="own", **common)
    elif kind == "transcoder":
        spec = CoderSpec(
            D, 8, 40, TopK(5), (SITE,), (Site("y", width=8),), pre_bias="own", skip=True, calibration=(0.3,),
            select_by_decoder_norm=True, **common,
        )  # fmt: skip
    else:
        sites = [tuple(Site(f"{side}{i}", width=4) for i in range(4)) for side in "rw"]
        spec = CoderSpec(
            D, D, 40, TopK(2), *sites, cross_layer=True, pre_bias="own", decoder_norm="free", budget="shared", **common
        )
    coder, draw = SparseCoder(spec), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        coder.b_enc.mul_(2)
        coder.b_enc[:4] = -100
        if kind == "jumprelu":
            coder.threshold.copy_(torch.rand(40, generator=draw) * 4)
    return coder


KINDS = ("topk", "jumprelu", "transcoder", "cross_layer")


@pytest.fixture
def sample():
    return torch.randn(500, D, generator=torch.Generator().manual_seed(9)) * 3 + 1


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_are_the_positive_coordinates(kind, sample):
    made = baseline_coder("neurons", trained(kind))
    assert torch.equal(made.encode(sample).to_dense(), sample.relu())
    assert made.spec.reads == made.spec.writes == trained(kind).spec.reads
    few = baseline_coder("topk_neurons", trained(kind), k=3)
    kept = few.encode(sample).to_dense()
    assert torch.equal(kept, sample.relu().where(sample >= sample.topk(3).values[:, -1:], 0))
    assert baseline_coder("topk_neurons", trained(kind)).spec.selection.k == D, "32 of 16 are all"


@pytest.mark.parametrize("kind", KINDS)
def test_random_directions_fire_as_often_as_the_trained_latents(kind, sample, monkeypatch):
    coder = trained(kind)
    monkeypatch.setattr("interp.evidence.baselines.CHUNK_ENTRIES", 2000)  # a few latents, or tokens, at a time
    made = baseline_coder("random_direction", coder, sample=sample)
    fired = coder.encode(sample).fired()
    assert torch.equal(made.encode(sample).fired(), fired)
    assert (fired[:4] == 0).all()
    assert fired.float().std() > 10, "they differ"
    assert torch.allclose(made.W_enc.norm(dim=1), torch.ones(40))
    assert torch.allclose(made.W_dec.norm(dim=1), torch.ones(len(made.W_dec)))
    trained_rows = torch.nn.functional.normalize(coder.W_enc, dim=1)
    assert (made.W_enc * trained_rows).sum(1).abs().max() < 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_coder_has_as_many_active_latents(kind, sample):
    coder = trained(kind)
    made = baseline_coder("random_init", coder, sample=sample)
    assert isinstance(made.spec.selection, TopK)
    layers = coder.spec.n_blocks
    ours, theirs = (float(c.encode(sample).l0().mean()) for c in (made, coder))
    assert ours <= made.spec.selection.k * layers
    assert made.spec.selection.k == max(1, round(theirs / layers))
    if kind == "topk":
        expected = SparseCoder(made.spec)
        initialize(expected, coder.spec.normalize(sample)[0].mean(0), 0, "baseline")
        assert torch.equal(made.W_enc, expected.W_enc)
        assert torch.equal(made.b_dec, expected.b_dec)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_same_by_seed_and_say_what_they_are(name, kind, sample, tmp_path):
    coder = trained(kind)
    made, again, other = (baseline_coder(name, coder, seed, sample) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    assert torch.equal(made.W_enc, other.W_enc) == (not name.startswith("random"))
    assert made.spec.training == {"text": {"source": "x"}, "seed": 3, "baseline": name}
    assert made.spec.metrics == {}
    assert made.spec.mask.special_ids == MASK.special_ids
    assert made.spec.context_length == 64
    assert coder.spec.training == {"text": {"source": "x"}, "seed": 3}, "the trained one is as it was"
    hub.save(made, tmp_path / "coder")
    loaded = hub.load(tmp_path / "coder")
    assert loaded.spec == made.spec
    assert torch.equal(loaded.encode(sample).values, made.encode(sample).values)


def test_latents_that_always_fire_still_do(sample):
    coder = trained()
    with torch.no_grad():
        coder.b_enc[7] = 1000
    made = baseline_coder("random_direction", coder, sample=sample)
    assert int(made.encode(sample).fired()[7]) == len(sample)


def test_what_is_missing_is_named(sample):
    with pytest.raises(ConfigError, match=r"coder\.baseline: 'random_init' needs activations"):
        baseline_coder("random_init", trained())
    with pytest.raises(ConfigError, match=r"coder\.baseline: 'random_direction' needs activations"):
        baseline_coder("random_direction", trained(), sample=sample[:0])
    with pytest.raises(ConfigError, match=r"coder\.baseline: 'neuron'.*neurons"):
        baseline_coder("neuron", trained())


def test_they_are_read_and_coded_like_the_trained_coder():
    lm = tiny_lm()
    rows = torch.randint(3, 250, (30, 12), generator=torch.Generator().manual_seed(4)).int()
    rows[:, 0] = 0
    rows[20:, 8:] = PADDING
    corpus = SimpleNamespace(
        kept=np.arange(30), length=np.array([12] * 20 + [8] * 10), n_tokens=20 * 11 + 10 * 7,
        tokens=lambda chosen: rows[chosen],
    )  # fmt: skip
    coder = trained()
    coder.spec = coder.spec.with_(mask=MaskSpec((0, 1, 2), 1, {"model.layers.1": 1e6}))
    subject = Subject(coder, lambda: lm)
    everything = read_activations(subject, rows)[0]
    assert len(everything) == corpus.n_tokens
    assert torch.allclose(activation_sample(subject, corpus), everything)
    some = activation_sample(subject, corpus, 100)
    assert 60 <= len(some) <= 100
    assert {tuple(row) for row in some.tolist()} <= {tuple(row) for row in everything.tolist()}
    for name in BASELINES:
        made = Subject(baseline_coder(name, coder, sample=some), lambda: lm)
        coded = encode_rows(made, rows)
        assert len(coded.latents) == corpus.n_tokens, "of the same tokens"
        assert torch.allclose(coded.latents.values, made.coder.encode(everything).values, atol=1e-4)
