"""circuit-tracer's sets of per-layer transcoders: read as they were released, and written."""

import numpy as np
import pytest
import torch
import yaml
from rigs.format_files import D_IN, D_OUT, D_SAE, loads
from rigs.released.circuit_tracer import CONFIG, THRESHOLD, K, write
from safetensors.numpy import load_file, save_file

import sae
from sae.base.errors import ConfigError, DataError
from sae.coder.coder import SparseCoder
from sae.coder.spec import CoderSpec
from sae.formats.circuit_tracer import write as export
from sae.lm.site import Site
from sae.loading.hub import load_all
from sae.selection.jumprelu import JumpReLU
from sae.selection.relu import ReLU
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK
from sae.selection.unrectified_topk import UnrectifiedTopK


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("rule", "more", "selection"),
    [
        ("relu", {}, ReLU()),
        ("relu", {"activation": "relu"}, ReLU()),
        ("jumprelu", {}, JumpReLU()),
        ("topk", {"activation": "topk", "k": K}, UnrectifiedTopK(K)),
    ],
)
def test_the_rule_comes_from_the_config_or_the_thresholds(tmp_path, rule, more, selection, skip):
    folder, wanted = write(tmp_path, rule, {**CONFIG, **more}, skip=skip)
    spec = loads(folder, wanted).spec
    assert (spec.selection, spec.skip, spec.pre_bias) == (selection, skip, "none")
    assert (spec.reads[0].hook, spec.writes[0].hook) == ("blocks.7.mlp.hook_in", "blocks.7.hook_mlp_out")
    assert spec.reads[0].model == spec.writes[0].model == "Qwen/Qwen3-4B"


@pytest.mark.parametrize(
    ("hook", "written"),
    [("ln2.hook_normalized", "hook_mlp_out"), ("hook_resid_mid", "hook_mlp_out"), ("mlp.hook_in", "mlp.hook_out")],
)
def test_hooks_are_those_of_the_files_layer(tmp_path, hook, written):
    folder, _ = write(tmp_path, config={**CONFIG, "feature_input_hook": hook, "feature_output_hook": written}, layer=12)
    spec = sae.load(folder).spec
    assert (spec.reads[0].hook, spec.writes[0].hook) == (f"blocks.12.{hook}", f"blocks.12.{written}")


def test_a_set_has_one_coder_a_layer(tmp_path):
    wanted = [write(tmp_path, layer=i, d_out=D_IN)[1] for i in range(3)]
    found = load_all(tmp_path)
    assert sorted(found) == [f"layer_{i}.safetensors" for i in range(3)]
    for i in range(3):
        assert found[f"layer_{i}.safetensors"].spec.reads[0].hook == f"blocks.{i}.mlp.hook_in"
        loads(tmp_path / f"layer_{i}.safetensors", wanted[i])


@pytest.mark.parametrize("d_sae", [D_SAE, D_OUT])
def test_decoders_of_june_2025_are_stored_the_other_way_round(tmp_path, d_sae):
    folder, wanted = write(tmp_path, d_sae=d_sae, skip=True, turned=d_sae != D_OUT)
    loads(folder, wanted)  # a square one is taken as documented


def test_the_coders_for_crv_are_topk_of_128(tmp_path):
    root = tmp_path / "facebook" / "crv-8b-instruct-transcoders"
    folder, wanted = write(root, "top128", {**CONFIG, "model_name": "meta-llama/Llama-3.1-8B-Instruct"}, d_sae=600)
    assert loads(folder, wanted).spec.selection == UnrectifiedTopK(128)


@pytest.mark.parametrize("beside", ["wandb-config.yaml", "wanb-config.yaml"])
def test_sets_without_a_config_are_relu_and_known_by_their_repository(tmp_path, beside):
    folder, wanted = write(tmp_path / "mwhanna" / "qwen3-14b-transcoders-lowl0", config=None)
    (folder / beside).write_text("d_model: {value: 6}\n")
    spec = loads(folder, wanted).spec
    assert spec.selection == ReLU()
    assert (spec.reads[0].hook, spec.reads[0].model) == ("blocks.7.mlp.hook_in", "Qwen/Qwen3-14B")


def test_without_a_config_the_user_says_where(tmp_path):
    folder, wanted = write(tmp_path, "jumprelu", config=None)
    assert not loads(folder, wanted).spec.is_placed
    spec = loads(folder, wanted, site="blocks.*.hook_resid_mid->model.layers.7.mlp", model="m").spec
    assert (spec.reads[0], spec.writes[0]) == (
        Site("blocks.7.hook_resid_mid", model="m"),
        Site("model.layers.7.mlp", model="m"),
    )
    with pytest.raises(ConfigError, match=r"site: 'blocks\.7\.hook_resid_mid' is not READ->WRITTEN"):
        sae.load(folder, site="blocks.7.hook_resid_mid")


def test_files_that_a_config_points_to_are_only_reported(tmp_path):
    listed = ["hf://google/gemma-scope-2b-pt-transcoders/../../etc/passwd?revision=x"]
    folder, wanted = write(tmp_path, config={**CONFIG, "transcoders": listed})
    assert loads(folder, wanted).spec.training["transcoders"] == listed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'; known are relu, topk"),
        ({"activation": "topk"}, "k is missing"),
        ({"activation": "topk", "k": 2.5}, "k is 2.5, expected a whole number"),
        ({"model_kind": "cross_layer_transcoder"}, "model_kind is 'cross_layer_transcoder'; known are transcoder_set"),
        ({"feature_output_hook": "mlp.hook_outt"}, "feature_output_hook is .* Did you mean 'mlp.hook_out'"),
        ({"feature_input_hook": None}, "feature_input_hook is None; known are"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(tmp_path, more, message):
    folder, _ = write(tmp_path, config={**CONFIG, **more})
    with pytest.raises(DataError, match=message):
        sae.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(log_thresholds=t["b_enc"]), "tensor log_thresholds is not part of this format"),
        (lambda t: t.update(k=np.array([3.0], np.float32)), "tensor k is not part of this format"),
        (lambda t: t.update({THRESHOLD: t["b_enc"]}), "has negative thresholds"),
        (lambda t: t.update(W_enc=t["W_enc"].T.copy()), "tensor W_enc has shape"),
        (lambda t: t.update(W_skip=np.zeros((D_IN, D_OUT), np.float32)), "tensor W_skip has shape"),
        (lambda t: t.update(W_dec=t["W_dec"][:, 1:].copy()), "tensor W_dec has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    folder, _ = write(tmp_path)
    tensors = load_file(folder / "layer_7.safetensors")
    change(tensors)
    save_file(tensors, folder / "layer_7.safetensors")
    with pytest.raises(DataError, match=message):
        sae.load(folder)


def test_k_may_be_a_tensor_but_not_another_one(tmp_path):
    folder, wanted = write(tmp_path, "topk", {**CONFIG, "activation": "topk"})
    tensors = load_file(folder / "layer_7.safetensors")
    save_file({**tensors, "k": np.array(K, np.int64)}, folder / "layer_7.safetensors")
    assert loads(folder, wanted).spec.selection == UnrectifiedTopK(K)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "activation": "topk", "k": K + 1}))
    with pytest.raises(DataError, match="k is given as 10 and as 9"):
        sae.load(folder)


def made(selection, read="blocks.3.hook_resid_mid", written="blocks.3.hook_mlp_out", skip=False, d_out=D_IN, **more):
    reads, writes = ((Site(*text.split(":"), model="m/n"),) for text in (read, written))
    fields = {"pre_bias": "none", "decoder_norm": "free", "skip": skip, **more}
    coder = SparseCoder(CoderSpec(D_IN, d_out, D_SAE, selection, reads, writes, **fields))
    for parameter in coder.parameters():
        torch.nn.init.normal_(parameter)
    return coder


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("selection", [ReLU(), JumpReLU(), UnrectifiedTopK(K)])
def test_what_is_written_is_read_back(tmp_path, selection, skip):
    coder = made(selection, skip=skip)
    export(tmp_path, coder)
    found = sae.load(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "layer_3.safetensors"]
    assert (found.spec.reads, found.spec.writes) == (coder.spec.reads, coder.spec.writes)
    assert (found.spec.selection, found.spec.skip) == (selection, skip)
    for name, tensor in coder.state_dict().items():
        kept = tensor.clamp_min(0) if name == "threshold" else tensor
        assert torch.equal(found.state_dict()[name], kept), name
    x = torch.randn(32, D_IN)
    assert torch.equal(found(x).latents.to_dense(), coder(x).latents.to_dense())
    assert torch.equal(found(x).out, coder(x).out)


@pytest.mark.parametrize(
    ("read", "written", "named"),
    [
        ("model.layers.3.mlp:input", "model.layers.3.mlp", ("mlp.hook_in", "mlp.hook_out")),
        ("layers.3.pre_feedforward_layernorm", "blocks.3.hook_mlp_out", ("mlp.hook_in", "hook_mlp_out")),
        ("model.layers.3.pre_feedforward_layernorm:normalized", "model.layers.3.post_feedforward_layernorm",
         ("ln2.hook_normalized", "hook_mlp_out")),
    ],
)  # fmt: skip
def test_hooks_are_named_as_circuit_tracer_does(tmp_path, read, written, named):
    export(tmp_path, made(ReLU(), read, written))
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    hooks = dict(zip(("feature_input_hook", "feature_output_hook"), named, strict=True))
    assert config == {"model_name": "m/n", "model_kind": "transcoder_set", "activation": "relu", **hooks}


def test_the_layers_of_a_set_share_one_config(tmp_path):
    export(tmp_path, made(UnrectifiedTopK(K)))
    export(tmp_path, made(UnrectifiedTopK(K), "blocks.4.hook_resid_mid", "blocks.4.hook_mlp_out"))
    assert sorted(load_all(tmp_path)) == ["layer_3.safetensors", "layer_4.safetensors"]
    with pytest.raises(ConfigError, match=r"config\.yaml describes another set"):
        export(tmp_path, made(UnrectifiedTopK(K + 1)))
    assert sae.load(tmp_path / "layer_3.safetensors").spec.selection == UnrectifiedTopK(K)


@pytest.mark.parametrize(
    ("coder", "message"),
    [
        (lambda: made(SignedTopK(K)), "selection: circuit-tracer cannot say 'signed_topk'"),
        (lambda: made(TopK(K)), "selection: circuit-tracer cannot say 'topk'"),
        (lambda: made(ReLU(), pre_bias="own"), "pre_bias: circuit-tracer cannot say 'own'"),
        (
            lambda: made(UnrectifiedTopK(K), select_by_decoder_norm=True),
            "select_by_decoder_norm: circuit-tracer cannot say",
        ),
        (lambda: made(ReLU(), d_out=D_OUT), "d_out: circuit-tracer cannot say 5 beside d_in = 6"),
        (lambda: made(ReLU(), written="blocks.4.hook_mlp_out"), "writes: circuit-tracer cannot say layer 4"),
        (lambda: made(ReLU(), "model.norm"), r"site: circuit-tracer has no name for 'model\.norm'"),
        (lambda: made(ReLU(), "blocks.3.hook_x"), r"site: circuit-tracer has no name for 'blocks\.3\.hook_x'"),
        (lambda: made(ReLU(), "model.layers.3.post_attention_layernorm:input"), "fits every model"),
    ],
)
def test_what_cannot_be_said_is_refused_before_anything_is_written(tmp_path, coder, message):
    with pytest.raises(ConfigError, match=message):
        export(tmp_path / "out", coder())
    assert not (tmp_path / "out").exists()


def test_a_coder_without_sites_and_one_with_nan_are_refused(tmp_path):
    coder = made(ReLU())
    coder.spec = coder.spec.with_(reads=(), writes=())
    with pytest.raises(ConfigError, match=r"^reads: circuit-tracer needs to know"):
        export(tmp_path / "out", coder)
    coder = made(ReLU())
    coder.b_dec.data[0] = float("nan")
    with pytest.raises(DataError, match="tensor b_dec holds NaN"):
        export(tmp_path / "out", coder)
    assert not (tmp_path / "out").exists()
