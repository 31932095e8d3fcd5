"""The adapter has what SAELens' users and evaluations read, with the coder's own numbers, and no SAELens."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from rigs.hub_coders import native

import sae
from sae.base.errors import ConfigError
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection.gradient_topk import GradientTopK
from sae.selection.jumprelu import JumpReLU
from sae.selection.topk import TopK

D, M, K = 6, 24, TopK(4)
STREAM, MLP = (
    Site("model.layers.3", model="tiny/llama", width=D),
    Site("model.layers.3.mlp", model="tiny/llama", width=4),
)
TRANSCODES = {"writes": (MLP,), "d_out": 4, "pre_bias": "none"}
KINDS = [
    {},
    {"normalization": Normalization("scalar", 0.37)},
    {"normalization": Normalization("layer_norm", eps=1e-5, undo_eps=False)},
    {"normalization": Normalization("l2", eps=0.0)},
    {"rule": JumpReLU()},
    {"skip": True},
    TRANSCODES,
]


def made(rule=K, reads=(STREAM,), writes=None, d_out=D, **how):
    how = {"mask": MaskSpec((0, 2)), "context_length": 16, "training": {"text": {"source": "docs"}}, **how}
    coder = SparseCoder(CoderSpec(D, d_out, M, rule, reads, reads if writes is None else writes, **how))
    initialize(coder, torch.zeros(d_out), 0)
    for number, (_, tensor) in enumerate(coder.named_parameters()):
        tensor.data.add_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    return coder.requires_grad_(False)


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_the_numbers_are_those_of_the_coder(how):
    coder, x = made(**how), torch.randn(2, 5, D) + 0.5
    lens = sae.as_saelens(coder)
    acts = lens.encode(x)
    assert type(acts) is torch.Tensor
    torch.testing.assert_close(acts, coder.encode(x).to_dense())
    torch.testing.assert_close(lens.decode(acts), coder.decode(coder.encode(x), x))
    torch.testing.assert_close(lens(x), coder(x).out)
    torch.testing.assert_close(lens(x.numpy()), lens(x))
    torch.testing.assert_close(lens.decode(lens.encode(x.tolist()).numpy()), lens.decode(acts))
    assert lens.W_enc.shape == (D, M)
    assert lens.W_dec.shape == (M, coder.spec.d_out)
    kind = coder.spec.normalization
    if kind.kind in ("none", "scalar") and coder.spec.pre_bias == "decoder":  # the encoder as people write it out
        h = (x - lens.b_dec * lens.cfg.apply_b_dec_to_input) @ lens.W_enc + lens.b_enc
        torch.testing.assert_close(acts[acts != 0], h[acts != 0])
    h = lens.process_sae_in(x) @ lens.W_enc + lens.b_enc
    torch.testing.assert_close(acts[acts != 0], h[acts != 0])
    if coder.spec.is_autoencoder and kind.kind != "layer_norm":  # whose eps SAELens does not undo
        torch.testing.assert_close(lens.run_time_activation_norm_fn_out(lens.run_time_activation_norm_fn_in(x)), x)


def test_what_evaluations_read_of_the_config():
    lens = sae.as_saelens(made()).eval()
    cfg, about = lens.cfg, lens.cfg.metadata
    assert (cfg.d_in, cfg.d_sae, cfg.k, cfg.dtype, cfg.device) == (D, M, 4, "float32", "cpu")
    assert cfg.architecture() == cfg.architecture == "topk"
    assert (cfg.apply_b_dec_to_input, cfg.normalize_activations, cfg.reshape_activations) == (True, "none", "none")
    said = {"hook_name": "model.layers.3", "hook_layer": 3, "hook_head_index": None, "model_name": "tiny/llama"}
    said |= {"context_size": 16, "prepend_bos": True, "seqpos_slice": [1, None], "exclude_special_tokens": [0, 2]}
    said |= {"model_from_pretrained_kwargs": {}, "dataset_path": "docs", "model_class_name": "AutoModelForCausalLM"}
    for name, value in said.items():
        assert getattr(about, name) == about[name] == about.get(name) == getattr(cfg, name) == value
    assert (about.neuronpedia_id, about["nothing"], "hook_name_out" in about) == (None, None, False)
    assert cfg.to_dict()["metadata"]["hook_name"] == "model.layers.3"
    assert lens.get_name() == f"sae_tiny/llama_model.layers.3_{M}"
    assert (lens.dtype, lens.device, lens.use_error_term) == (torch.float32, torch.device("cpu"), False)
    with pytest.raises(AttributeError, match="cfg has no 'nonsense'"):
        cfg.nonsense  # noqa: B018
    assert not hasattr(lens, "threshold")
    assert sae.as_saelens(made(JumpReLU())).threshold.shape == (M,)


def test_the_model_may_call_the_site_otherwise():
    about = sae.as_saelens(made(), hook_name="blocks.7.hook_resid_post", model_name="tiny").cfg.metadata
    assert (about.hook_name, about.hook_layer, about.model_name) == ("blocks.7.hook_resid_post", 7, "tiny")
    assert about.model_class_name == "HookedTransformer"
    about = sae.as_saelens(made(reads=()), hook_name="blocks.1.hook_mlp_out").cfg.metadata
    assert about.hook_name == "blocks.1.hook_mlp_out"
    about = sae.as_saelens(made(**TRANSCODES), "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out").cfg.metadata
    assert (about.hook_name, about.hook_name_out) == ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out")
    assert sae.as_saelens(made(reads=())).cfg.metadata.hook_name is None


def test_precision_and_folding_change_it_in_place():
    lens = sae.as_saelens(made(JumpReLU(), decoder_norm="free"))
    x = torch.randn(5, D)
    before = lens(x)
    lens.fold_W_dec_norm()
    torch.testing.assert_close(lens.W_dec.norm(dim=1), torch.ones(M))
    torch.testing.assert_close(lens(x), before)
    assert lens.to(torch.bfloat16) is lens
    assert (lens.dtype, lens.cfg.dtype, lens.encode(x).dtype) == (torch.bfloat16, "bfloat16", torch.bfloat16)
    assert sae.as_saelens(lens).coder is lens.coder


def test_heads_come_apart_as_transformer_lens_has_them():
    site = Site("blocks.1.attn.hook_z", model="m", width=D, heads=2)
    coder, z = made(reads=(site,)), torch.randn(3, 2, 3)
    lens = sae.as_saelens(coder)
    assert lens.cfg.reshape_activations == "hook_z"
    torch.testing.assert_close(lens(z), coder(z.flatten(-2)).out.unflatten(-1, (2, 3)))
    lens.turn_off_forward_pass_hook_z_reshaping()
    torch.testing.assert_close(lens(z.flatten(-2)), coder(z.flatten(-2)).out)
    lens.turn_on_forward_pass_hook_z_reshaping()
    assert lens(z).shape == z.shape


def test_hooks_are_those_of_transformer_lens_once_it_is_there(monkeypatch):
    lens, x = sae.as_saelens(made()), torch.randn(5, D)
    plain = lens(x)
    lens.use_error_term = True
    torch.testing.assert_close(lens(x), x)
    lens.use_error_term = False

    class HookPoint(torch.nn.Identity):
        pass

    module = ModuleType("transformer_lens.hook_points")
    module.HookPoint = HookPoint
    monkeypatch.setitem(sys.modules, "transformer_lens.hook_points", module)
    hooks = lens.hook_dict
    assert {"hook_sae_input", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output"} <= set(hooks)
    assert all(isinstance(hook, HookPoint) and hook.name == name for name, hook in hooks.items())
    hooks["hook_sae_acts_post"].register_forward_hook(lambda module, given, acts: acts * 0)
    torch.testing.assert_close(lens(x), lens.b_dec.expand(5, D))
    setattr(lens, "hook_sae_acts_post", torch.nn.Identity())  # noqa: B010  # as SAELens turns hooks off
    torch.testing.assert_close(lens(x), plain)
    assert lens.hook_dict is hooks


def test_what_is_saved_is_saelens_own_format(tmp_path):
    coder = made(normalization=Normalization("scalar", 0.37))
    files = sae.as_saelens(coder).save_model(tmp_path / "saved")
    assert [path.name for path in files] == ["sae_weights.safetensors", "cfg.json"]
    x = torch.randn(5, D)
    torch.testing.assert_close(sae.load(tmp_path / "saved")(x).out, coder(x).out)


@pytest.mark.parametrize(
    ("coder", "error", "message"),
    [
        ("crosscoder", ConfigError, "a crosscoder of several"),
        ("cross-layer", ConfigError, "a cross-layer transcoder of several sites"),
        (made(GradientTopK(4, inference="gradient")), ConfigError, "looks at gradients"),
        (torch.randn(3), TypeError, "expected a SparseCoder, or a name to load one by, not a Tensor"),
        ("no/such/folder/here", ConfigError, "path: "),
    ],
    ids=range(5),
)
def test_what_saelens_has_no_coder_for_is_one_line(coder, error, message):
    two = (Site("a", width=3), Site("b", width=3))
    if isinstance(coder, str) and coder == "crosscoder":
        coder = SparseCoder(CoderSpec(D, D, M, K, two, two))
    elif isinstance(coder, str) and coder == "cross-layer":
        coder = SparseCoder(CoderSpec(D, D, M, K, two, two, cross_layer=True, pre_bias="none"))
    with pytest.raises(error, match=message):
        sae.as_saelens(coder)


@pytest.mark.slow
def test_a_name_is_loaded_and_saelens_is_not(tmp_path):
    folder = native(tmp_path / "mine")
    code = f"import sae, sys; print(sae.as_saelens({str(folder)!r}).cfg.d_sae, 'sae_lens' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "20 False\n"
