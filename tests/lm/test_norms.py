"""A norm's kind is told by what it computes, whatever its class is called."""

import pytest
import torch
from rigs.tiny_lms import D, tiny_lm
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from sae.base.errors import ConfigError
from sae.lm.hooks import before_gain, capture
from sae.lm.models import LanguageModel
from sae.lm.norms import Norm, _measured, norm_of
from sae.lm.site import Site


class Outside(nn.Module):
    """An RMS norm called otherwise, whose epsilon stands beside the root."""

    def __init__(self):
        super().__init__()
        self.epsilon, self.scale = 1e-3, nn.Parameter(torch.ones(D))

    def forward(self, x):
        return self.scale * x / (x.square().mean(-1, keepdim=True).sqrt() + self.epsilon)


class Squashed(nn.Module):
    """Called a norm, and none: it takes no account of the size of its input."""

    def __init__(self):
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(torch.ones(D))

    def forward(self, x):
        return self.weight * torch.tanh(x)


NORMS = {
    "torch layer": (lambda: nn.LayerNorm(D), Norm(True, 1e-5)),
    "torch layer, no gain": (lambda: nn.LayerNorm(D, elementwise_affine=False, eps=1e-3), Norm(True, 1e-3)),
    "torch rms": (lambda: nn.RMSNorm(D, eps=1e-6), Norm(False, 1e-6)),
    "llama": (lambda: LlamaRMSNorm(D, eps=1e-5), Norm(False, 1e-5)),
    "gemma, 1 + w": (lambda: GemmaRMSNorm(D), Norm(False, 1e-6)),
    "t5, called a layer norm": (lambda: T5LayerNorm(D), Norm(False, 1e-6)),
    "cohere": (lambda: CohereLayerNorm(D), Norm(True, 1e-5)),
    "nemotron, 1 + w": (lambda: NemotronLayerNorm1P(D), Norm(True, 1e-5)),
    "olmo, no gain, no epsilon said": (lambda: OlmoLayerNorm(D), Norm(True, 1e-5)),
    "llama 4, no gain": (lambda: Llama4TextL2Norm(eps=1e-6), Norm(False, 1e-6)),
    "epsilon outside the root": (Outside, Norm(False, 1e-3, outside=True)),
}
OTHERS = {
    "linear": lambda: nn.Linear(D, D),
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.1),
    "batch": lambda: nn.BatchNorm1d(D),
    "groups": lambda: nn.GroupNorm(4, D),
    "called a norm": Squashed,
    "zero": lambda: zeroed(nn.LayerNorm(D)),
}


def zeroed(norm):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.zero_()
    return norm


def drawn(make):
    torch.manual_seed(0)
    norm = make().eval().requires_grad_(False)
    for parameter in norm.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return norm


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kinds_of_norm(name, dtype):
    make, wanted = NORMS[name]
    assert norm_of(drawn(make).to(dtype), D) == wanted


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_before_the_gain_the_output_is_undone(name, size):
    """A norm's output is its gain times this plus its bias, at every size of input."""
    norm = drawn(NORMS[name][0])
    x = size * (torch.randn(64, D) + 2)
    bias = norm(torch.zeros(D)).nan_to_num()
    gain = (norm(x) - bias) / before_gain(norm, x, Site("norm", "normalized"))
    torch.testing.assert_close(gain, gain[:1].expand_as(gain), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_is_no_norm_has_no_such_side(make):
    module = make().eval()
    assert norm_of(module, D) is None
    with pytest.raises(
        ConfigError, match=rf"site here:normalized: {type(module).__name__} computes no layer norm or RMS"
    ):
        before_gain(module, torch.randn(4, D), Site("here", "normalized"))


def test_a_norm_that_needs_more_than_a_vector_is_refused():
    class Both(nn.LayerNorm):
        def forward(self, x, gate):
            return super().forward(x) * gate

    assert norm_of(Both(D), D) is None


def test_the_norm_of_t5_keeps_the_mean():
    model = tiny_lm("t5", causal=False)
    lm, site = LanguageModel(model.encoder, None, "t5", None, False), Site("block.0.layer.0.layer_norm", "normalized")
    ids = torch.arange(3, 15).reshape(2, 6)
    x = model.shared(ids)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(capture(lm, [site], ids)[site.name], wanted)


def test_weights_that_a_disk_does_not_give_are_no_answer(monkeypatch):
    def unreadable(_module):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("sae.lm.norms.without_hooks", unreadable)
    with pytest.raises(OSError, match="Input/output"):
        _measured(nn.LayerNorm(8), 8)
