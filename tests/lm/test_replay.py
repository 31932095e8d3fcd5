"""Passes that begin where they differ: the same logits, what is skipped, and models that cannot go on without."""

import pytest
import torch
from rigs.fakes import sampled_rows, tiny_lm
from rigs.tiny_lms import tiny_lm as of_type
from torch import nn

from sae.lm.hooks import capture
from sae.lm.intervene import ablate
from sae.lm.replay import Stretch, recorded, replayed
from sae.lm.site import Site

IDS = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 10]])


def runs(model):
    """Returns the modules that compute something, as they do."""
    found = []
    for path, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, path=path: found.append(path))
    return found


@pytest.mark.parametrize("hook", ["layers.1", "layers.1:input", "layers.1.mlp", "layers.0.self_attn"])
@torch.no_grad()
def test_a_changed_pass_is_the_same_and_runs_no_layer_below(hook):
    model = tiny_lm().model
    name, _, side = hook.partition(":")
    site = Site(f"model.{name}", side or "output")
    stretch = Stretch((site,))
    with ablate(model, [site]):
        expected = model(IDS).logits
    with recorded(model, [stretch]) as made:
        clean = model(IDS).logits
    with replayed(model, made[stretch]):
        assert torch.equal(model(IDS).logits, clean)
        ran = runs(model)
        with ablate(model, [site]):
            assert torch.equal(model(IDS).logits, expected)
    below = "model.layers.0." if name.startswith("layers.1") else "model.layers.0.self_attn.q_proj"
    assert not [path for path in ran if path.startswith(below)]
    assert "model.layers.2.mlp.down_proj" in ran
    assert torch.equal(model(IDS).logits, clean), "nothing stays behind"


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "gemma3_text", "mixtral"])
@torch.no_grad()
def test_models_of_other_kinds(kind):
    model = of_type(kind)
    layers = [path for path, module in model.named_modules() if path.endswith((".layers.0", ".h.0"))]
    site = Site(*layers)
    stretch = Stretch((site,))
    with ablate(model, [site]):
        expected = model(IDS).logits
    with recorded(model, [stretch]) as made:
        model(IDS)
    with replayed(model, made[stretch]), ablate(model, [site]):
        assert made[stretch]
        assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_what_a_capture_has_computed_is_where_the_whole_pass_goes_on():
    lm = tiny_lm()
    tokens = sampled_rows(lm, 12, 4).data
    sites = [Site("model.layers.1"), Site("model.layers.2.mlp", "input")]
    first, whole = Stretch(tuple(sites)), Stretch(tuple(sites), to_last=True)
    with recorded(lm.model, [first, whole]) as made:
        seen = capture(lm, sites, tokens)
    assert all(torch.equal(x, capture(lm, sites, tokens)[name]) for name, x in seen.items())
    expected = lm.model(tokens.clamp_min(0).long()).logits
    for stretch in (first, whole):
        with replayed(lm.model, made[stretch]):
            assert torch.equal(lm.model(tokens.clamp_min(0).long()).logits, expected)
    layers = lm.model.model.layers
    assert torch.equal(made[first][layers[1]], seen["model.layers.1"])
    assert made[whole][layers[0]].isnan().all(), "what was handed on is not kept"
    assert made[whole][layers[2].self_attn][0].shape == (4, 12, 16)


class LeavesSomething(nn.Module):
    """Around a layer that leaves its output for a later one to add, as layers do that share keys and values."""

    def __init__(self, layer, beside, reads):
        super().__init__()
        self.layer, self.beside, self.reads = layer, beside, reads

    def forward(self, x, **options):
        if self.reads:
            return self.layer(x + self.beside.pop(), **options)
        self.beside.append(self.layer(x, **options))
        return self.beside[-1]


class Changes(nn.Module):
    """Around a layer that adds to what it is given in place."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, **options):
        return x.add_(self.layer(x, **options))


@torch.no_grad()
def test_of_a_model_that_cannot_go_on_without_nothing_is_kept():
    lm, beside, stretch = tiny_lm(), [], Stretch((Site("model.layers.1"),))
    layers = lm.model.model.layers
    layers[0], layers[2] = LeavesSomething(layers[0], beside, False), LeavesSomething(layers[2], beside, True)
    with recorded(lm.model, [stretch]) as made:
        lm.model(IDS)
    assert not made


@torch.no_grad()
def test_what_is_changed_in_place_is_not_kept():
    lm, stretch = tiny_lm(), Stretch((Site("model.layers.1"),))
    lm.model.model.layers[2] = Changes(lm.model.model.layers[2])
    with recorded(lm.model, [stretch]) as made:
        capture(lm, [*stretch.sites], IDS)  # which ends before that is seen
    assert not made


def test_within_inference_mode_nothing_is_kept():
    lm, stretch = tiny_lm(), Stretch((Site("model.layers.1"),))
    with torch.inference_mode(), recorded(lm.model, [stretch]) as made:
        lm.model(IDS)
    assert not made
