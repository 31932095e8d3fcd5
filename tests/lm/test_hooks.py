"""Activations as the model itself reports them, of several architectures; gradients, masks and statistics."""

import numpy as np
import pytest
import torch
from rigs.tiny_lms import tiny_lm
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from sae.base.errors import ConfigError
from sae.lm.hooks import capture, capture_with_gradients, hooked, site_widths
from sae.lm.intervene import replace_at
from sae.lm.masking import MaskSpec, norm_mask, token_mask
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.lm.sites import resolve_sites
from sae.stream.batch import Block
from sae.stream.sources import CachedSource
from sae.text.packing import PADDING

VOCABULARY, D, HEADS, LAYERS = 40, 16, 4, 3
SIZES = {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}


def causal(kind: str, **options) -> LanguageModel:
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32, **options)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=D, n_layer=LAYERS, n_head=HEADS)),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=32, max_position_embeddings=64)),
    }[kind]()
    return LanguageModel(model.eval(), None, kind, None, True)


def encoder() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(BertModel(BertConfig(**SIZES, intermediate_size=32)).eval(), None, "bert", None, False)


def tokens(rows=3, context=7):
    return torch.randint(0, VOCABULARY, (rows, context), dtype=torch.int32)


def at(lm, *typed):
    return resolve_sites(lm.model, typed)


@pytest.mark.parametrize(
    ("kind", "layers"), [("llama", "model.layers"), ("gpt2", "transformer.h"), ("neox", "gpt_neox.layers")]
)
def test_layers_equal_what_the_model_reports_itself(kind, layers):
    lm, ids = causal(kind), tokens()
    with torch.no_grad():
        reported = lm.model(ids.long(), output_hidden_states=True).hidden_states
    names = [f"{layers}.{i}" for i in range(LAYERS)]
    outputs = capture(lm, at(lm, *names), ids)
    inputs = capture(lm, at(lm, *(f"{name}:input" for name in names)), ids)
    for i, name in enumerate(names):
        assert torch.equal(inputs[f"{name}:input"], reported[i])
        if i + 1 < LAYERS:  # the last entry of hidden_states has passed the final norm
            assert torch.equal(outputs[name], reported[i + 1])
            assert torch.equal(outputs[name], inputs[f"{names[i + 1]}:input"])
    alias = capture(lm, at(lm, "blocks.1.hook_resid_post"), ids)
    assert torch.equal(alias[names[1]], reported[2])


def test_an_encoder_and_its_padding():
    lm, ids = encoder(), tokens()
    ids[1, 4:] = PADDING
    with torch.no_grad():
        known = {"input_ids": ids.long().clamp_min(0), "attention_mask": (ids != PADDING).long()}
        reported = lm.model(**known, output_hidden_states=True).hidden_states
    seen = capture(lm, at(lm, "encoder.layer.1"), ids)["encoder.layer.1"]
    assert torch.equal(seen, reported[2])
    other = ids.clone()
    alone = capture(lm, at(lm, "encoder.layer.1"), other[1:2, :4])["encoder.layer.1"]
    torch.testing.assert_close(seen[1:2, :4], alone)  # padding changes nothing of the text


def test_the_model_stops_behind_the_last_site():
    lm, ran = causal("llama"), []
    capture(lm, at(lm, "model.layers.1"), tokens())  # the first time all of it runs, to see what runs several times
    for name, module in lm.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    capture(lm, at(lm, "model.layers.1"), tokens())
    assert "model.layers.0" in ran
    assert "model.layers.1" in ran
    assert not any(name.startswith(("model.layers.2", "model.norm", "lm_head")) for name in ran)


def test_heads_are_concatenated_at_the_input_of_the_output_projection():
    lm, ids = causal("llama"), tokens()
    (site,) = at(lm, "blocks.1.attn.hook_z")
    assert (site.hook, site.side, site.heads) == ("model.layers.1.self_attn.o_proj", "input", HEADS)
    z = capture(lm, [site], ids)[site.name]
    assert z.shape == (*ids.shape, D)
    projection = lm.model.get_submodule(site.hook)
    assert torch.equal(projection(z), capture(lm, at(lm, "model.layers.1.self_attn"), ids)["model.layers.1.self_attn"])


def test_unflattened_heads_are_flattened():
    class Split(nn.Module):
        def forward(self, x):
            return x.unflatten(2, (HEADS, -1))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.split = nn.Embedding(VOCABULARY, D), Split()

        def forward(self, input_ids, use_cache):
            return self.split(self.embed(input_ids))

    lm = LanguageModel(Model(), None, "heads", None, True)
    ids = tokens()
    assert torch.equal(capture(lm, [Site("split")], ids)["split"], lm.model.embed(ids.long()).detach())


class Toy(nn.Module):
    """Modules as models have them that are not layers: one gives a tuple, one never runs, one runs twice."""

    def __init__(self):
        super().__init__()
        self.device = torch.device("cpu")
        self.embed = nn.Embedding(VOCABULARY, D)
        self.pair, self.unused, self.shared = Pair(), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, input_ids, use_cache):
        first, _ = self.pair(hidden_states=self.embed(input_ids))
        return self.shared(self.shared(first))


class Pair(nn.Module):
    def forward(self, hidden_states):
        return hidden_states + 1, "something else"


@pytest.fixture
def toy():
    return LanguageModel(Toy(), None, "toy", None, True)


def test_of_a_tuple_the_first_is_meant_and_keyword_inputs_are_seen(toy):
    ids = tokens()
    seen = capture(toy, [Site("pair"), Site("pair", "input")], ids)
    assert torch.equal(seen["pair"], toy.model.embed(ids.long()).detach() + 1)
    assert torch.equal(seen["pair:input"], toy.model.embed(ids.long()).detach())


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("unused"), "unused never ran in a forward pass of toy"),
        (Site("shared"), r"shared runs more than once per pass \(2 times\)"),
        (Site("missing"), "no module 'missing'"),
        (Site("embed", "input"), "embed:input gives int32 of shape .* not a vector per token"),
    ],
    ids=lambda value: value.name if isinstance(value, Site) else "",
)
def test_a_site_that_cannot_be_read_is_named(toy, site, message):
    with pytest.raises(ConfigError, match=message):
        site_widths(toy, [site])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in toy.model.modules())


@pytest.mark.parametrize(
    ("kind", "options", "path", "times"),
    [
        ("albert", {"num_hidden_layers": 4, "inner_group_num": 1}, "encoder.albert_layer_groups.0", 4),
        ("albert", {"num_hidden_layers": 4}, "encoder.albert_layer_groups.0.albert_layers.0.ffn_output:input", 4),
        ("dory", {}, "model.layers.1", 2),  # its layers are passed twice
    ],
)
def test_a_module_that_runs_several_times_is_no_site_even_where_it_is_the_last(kind, options, path, times):
    """The early stop would give its first run for all of them; whatever hooks it is refused."""
    model = tiny_lm(kind, causal=kind == "dory", **options)
    lm = LanguageModel(model, None, kind, None, kind == "dory")
    (site,) = at(lm, path)
    message = rf"runs more than once per pass \({times} times\)"
    for use in (
        lambda: capture(lm, [site], tokens()),
        lambda: site_widths(lm, [site]),
        lambda: replace_at(model, site, torch.zeros_like).__enter__(),
    ):
        with pytest.raises(ConfigError, match=message):
            use()


def test_a_probe_goes_unseen_by_hooks_that_are_open():
    lm, seen = causal("llama"), []
    with hooked(lm.model, at(lm, "model.layers.0"), lambda site, x: seen.append(x.shape)):
        at(lm, "blocks.1.hook_resid_mid")  # measures
        assert seen == []
        lm.model(tokens().long())
    assert seen == [(3, 7, D)]


def test_what_a_model_adds_to_in_place_is_read_as_it_was():
    """Falcon adds attention's output to the MLP's in place, after both were seen."""
    lm, ids = LanguageModel(tiny_lm("falcon"), None, "falcon", None, True), tokens()
    mlp, after = at(lm, "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post")
    alone = capture(lm, [mlp], ids)[mlp.name]
    assert torch.equal(capture(lm, [mlp, after], ids)[mlp.name], alone)
    assert torch.equal(capture_with_gradients(lm, [mlp], ids, MaskSpec())[0][mlp.name], alone)


def test_widths_of_all_kinds_of_site():
    lm = causal("llama")
    found = site_widths(lm, at(lm, "layers.0", "layers.0.mlp.down_proj:input", "lm_head"))
    assert found == {"model.layers.0": D, "model.layers.0.mlp.down_proj:input": 32, "lm_head": VOCABULARY}


def test_gradients_equal_finite_differences():
    lm, ids = causal("gpt2"), tokens(2, 5)  # whose norms, unlike Llama's, keep float64
    lm.model.double().requires_grad_(False)
    ids[1, 3:] = PADDING
    mask = MaskSpec((int(ids[0, 2]),), 1)
    sites = at(lm, "transformer.h.0", "transformer.h.1.mlp")
    activations, gradients = capture_with_gradients(lm, sites, ids, mask)
    for name, x in capture(lm, sites, ids).items():
        assert torch.equal(activations[name], x)

    def loss(site, changed):
        """The sum of -log p over the positions that the mask keeps, written out."""
        handle = lm.model.get_submodule(site.hook).register_forward_hook(lambda *_: changed)
        with torch.no_grad():
            log_p = lm.model(ids.long().clamp_min(0)).logits.log_softmax(-1)
        handle.remove()
        return -sum(
            float(log_p[r, t, ids[r, t + 1]])
            for r in range(2)
            for t in range(1, 4)
            if ids[r, t] != ids[0, 2] and ids[r, t] != PADDING and ids[r, t + 1] != PADDING
        )

    draw = np.random.default_rng(0)
    for site in sites:
        x = activations[site.name]
        for _ in range(8):
            place = tuple(int(draw.integers(n)) for n in x.shape)
            up, down = x.clone(), x.clone()
            up[place] += 1e-5
            down[place] -= 1e-5
            slope = (loss(site, up) - loss(site, down)) / 2e-5
            assert float(gradients[site.name][place]) == pytest.approx(slope, abs=1e-6, rel=1e-5)
    assert gradients["transformer.h.0"].abs().sum() > 0


def test_masks():
    ids = torch.tensor([[5, 1, 2, 3], [1, 5, 3, PADDING]], dtype=torch.int32)
    assert token_mask(ids, MaskSpec((5,), 0)).tolist() == [[False, True, True, True], [True, False, True, False]]
    assert token_mask(ids, MaskSpec((), 2)).tolist() == [[False, False, True, True], [False, False, True, False]]
    x = torch.tensor([[3.0, 4.0], [0.0, 5.1], [float("nan"), 0.0]])
    limit = MaskSpec(norm_limits={"x": 5.0})
    assert norm_mask({"x": x}, limit).tolist() == [True, False, True]
    assert norm_mask({"x": x / 0.0}, limit).tolist() == [True, True, True]  # NaN and Inf are not hidden
    assert norm_mask({"y": x, "x": x[[0, 0, 1]]}, limit).tolist() == [True, True, False], "by site"
    assert norm_mask({"x": x}, MaskSpec()).all()


def test_positions_without_a_next_token_are_masked_on_request():
    ids = torch.tensor([[5, 1, 2, 3], [1, 5, 3, PADDING]], dtype=torch.int32)
    mask = MaskSpec((5,), 0, next_token=True)
    assert token_mask(ids, mask).tolist() == [[False, True, True, False], [True, False, False, False]]


def test_what_one_rank_stores_another_does_not_compute_again(tmp_path):
    class Live:
        reads = 0

        def __len__(self):
            return 3

        def read(self, block):
            self.reads += 1
            return Block({"x": torch.full((4, 2), float(block))}, {"x": torch.ones(4, 2)})

    ranks = [CachedSource(Live(), tmp_path / "store", {"a": 1}, part=str(rank)) for rank in range(2)]  # type: ignore[arg-type]
    made, found = (source.read(2) for source in ranks)
    assert [source.live.reads for source in ranks] == [1, 0]  # type: ignore[attr-defined]
    for block in (made, found, ranks[0].read(2)):
        assert torch.equal(block.activations["x"], torch.full((4, 2), 2.0))
        assert torch.equal(block.gradients["x"], torch.ones(4, 2))


def test_a_model_that_cannot_be_asked_how_often_its_modules_run_is_not_read(monkeypatch):
    """Else the first run of a shared layer would pass for all of them."""
    model = tiny_lm("llama")
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: 1 / 0)
    with (
        pytest.raises(ConfigError, match=r"a pass over a few tokens fails \(ZeroDivisionError"),
        hooked(model, [Site("model.layers.1")], lambda site, x: None),
    ):
        pass
