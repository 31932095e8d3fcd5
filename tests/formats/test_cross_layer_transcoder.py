"""circuit-tracer's cross-layer transcoders, and the skip path of coders that are laid out layer by layer."""

import numpy as np
import pytest
import torch
from rigs.format_files import D_IN, D_OUT, agrees, loads
from rigs.released.cross_layer_transcoder import CONFIG, LAYERS, M, write
from safetensors.numpy import load_file, save_file

import sae
from sae.base.errors import DataError
from sae.coder.coder import Choice
from sae.loading.hub import load_all


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("jumps", [True, False])
def test_the_folder_is_one_coder_that_writes_to_its_own_and_later_layers(tmp_path, jumps, skip):
    folder, wanted = write(tmp_path / "clt", jumps, skip)
    spec = loads(folder, wanted).spec
    assert (spec.cross_layer, spec.skip, spec.pre_bias, spec.n_blocks) == (True, skip, "none", LAYERS)
    assert [site.hook for site in spec.reads] == [f"blocks.{i}.hook_resid_mid" for i in range(LAYERS)]
    assert [site.hook for site in spec.writes] == [f"blocks.{i}.hook_mlp_out" for i in range(LAYERS)]
    assert [site.width for site in spec.reads + spec.writes] == [D_IN] * LAYERS + [D_OUT] * LAYERS
    assert spec.reads[2].model == "meta-llama/Llama-3.2-1B"
    assert list(load_all(folder)) == ["clt"]
    agrees(sae.load(folder, lazy=True), wanted)


def test_the_skip_path_of_training_and_of_inference_is_that_of_the_layer(tmp_path):
    folder, _ = write(tmp_path, skip=True)
    coder = sae.load(folder)
    x = torch.randn(8, LAYERS * D_IN)
    weights = [load_file(folder / f"W_enc_{i}.safetensors")[f"W_skip_{i}"] for i in range(LAYERS)]
    expected = np.concatenate([x[:, i * D_IN : (i + 1) * D_IN].numpy() @ w for i, w in enumerate(weights)], 1)
    np.testing.assert_allclose(coder.skipped(x).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(coder.skipped(x[None]).numpy()[0], expected, atol=1e-5)
    trained = coder.run(coder.look(x), Choice(*coder.support(coder.scores(x))), x.new_zeros(len(x), coder.d_out))
    with torch.no_grad():
        inferred = coder(x)
    torch.testing.assert_close(trained.prediction, inferred.out)
    torch.testing.assert_close(inferred.out - coder.decode(inferred.latents, x), coder.skipped(x))


def test_without_a_config_the_hooks_are_asked_for(tmp_path):
    folder, wanted = write(tmp_path, config="")
    assert not loads(folder, wanted).spec.is_placed
    coder = loads(folder, wanted, site="blocks.*.mlp.hook_in->model.layers.*.mlp:output", model="mine")
    assert [site.hook for site in coder.spec.reads] == [f"blocks.{i}.mlp.hook_in" for i in range(LAYERS)]
    assert [(site.hook, site.model) for site in coder.spec.writes[1:2]] == [("model.layers.1.mlp", "mine")]


@pytest.mark.parametrize("name", ["W_enc_2", "W_dec_1", "W_dec_0"])
def test_no_file_may_be_missing(tmp_path, name):
    folder, _ = write(tmp_path)
    (folder / f"{name}.safetensors").unlink()
    with pytest.raises(DataError, match=rf"{name}\.safetensors is missing"):
        sae.load(folder)


def test_no_file_may_be_one_too_many(tmp_path):
    folder, _ = write(tmp_path)
    save_file({"W_enc_3": np.zeros((M, D_IN), np.float32)}, folder / "W_enc_3.safetensors")
    with pytest.raises(DataError, match=r"W_enc_3\.safetensors is one too many; W_dec_0 writes to 3 layers"):
        sae.load(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("W_enc_1", lambda t: t.pop("threshold_1"), "tensor threshold_1 is missing"),
        ("W_enc_0", lambda t: t.pop("threshold_0"), "tensor threshold_1 is not part of this format"),
        ("W_enc_2", lambda t: t["threshold_2"].__setitem__(0, -0.1), "threshold_2 has negative thresholds"),
        ("W_enc_2", lambda t: t.update(W_skip_2=np.zeros((D_IN, D_OUT), np.float32)), "W_skip_2 is not part"),
        ("W_enc_1", lambda t: t.update(W_enc_1=t["W_enc_1"].T.copy()), "tensor W_enc_1 has shape"),
        ("W_dec_1", lambda t: t.update(W_dec_1=t["W_dec_1"][:, 1:].copy()), "tensor W_dec_1 has shape"),
        ("W_dec_0", lambda t: t.update(W_dec_0=t["W_dec_0"][:, 0].copy()), r"expected \(M, layers, d_out\)"),
    ],
)
def test_layers_that_do_not_fit_together_are_refused(tmp_path, name, change, message):
    folder, _ = write(tmp_path)
    tensors = load_file(folder / f"{name}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    with pytest.raises(DataError, match=message):
        sae.load(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("activation: relu", "activation is 'relu'; known are jump_relu"),
        ("model_kind: transcoder_set", "model_kind is 'transcoder_set'; known are cross_layer_transcoder"),
        ("feature_input_hook: hook_resid_middle", "feature_input_hook is .* Did you mean 'hook_resid_mid'"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(tmp_path, line, message):
    name = line.partition(":")[0]
    config = "\n".join([part for part in CONFIG.splitlines() if not part.startswith(name)] + [line])
    folder, _ = write(tmp_path, config=config)
    with pytest.raises(DataError, match=message):
        sae.load(folder)
