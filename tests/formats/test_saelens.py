"""SAELens: every architecture and every generation of its config, read and written."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from rigs.fakes import tiny_lm
from rigs.format_files import D_IN, D_OUT, D_SAE, Draw, agrees, loads, write_json
from rigs.released.saelens import RESIDUAL, config3, config6, drawn, reference, saved
from safetensors.numpy import load_file, save_file

import sae
from sae import formats
from sae.base.errors import ConfigError, DataError
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.coder.splicing import splice
from sae.coder.wording import description
from sae.evaluation.doctor import diagnose
from sae.evaluation.evaluation import evaluate
from sae.formats import native, saelens
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection import Selection
from sae.selection.feature_choice import FeatureChoice
from sae.selection.gated import Gated
from sae.selection.gradient_topk import GradientTopK
from sae.selection.groupmax import GroupMax
from sae.selection.jumprelu import JumpReLU
from sae.selection.matching_pursuit import MatchingPursuit
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK
from sae.untrusted.files import LocalFiles
from sae.untrusted.places import Place

TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
KINDS = ("standard", "gated", "topk", "jumprelu", "abstopk", "matching_pursuit", *TRANSCODERS)


def scaled(inner, s):
    """The same coder, of inputs that it multiplies by s."""

    def run(x):
        acts, out, margin = inner(s * x)
        return acts, out / s, margin

    return run


def like(folder, config, tensors, x_scale=1.0, **hints):
    return loads(saved(folder, config, tensors), reference(config, tensors), x_scale=x_scale, **hints)


# What is read


@pytest.mark.parametrize("architecture", KINDS)
def test_every_architecture_is_read(tmp_path, architecture):
    coder = like(tmp_path, config6(architecture), drawn(architecture))
    assert coder.spec.reads == (Site(RESIDUAL, model="openai-community/gpt2"),)
    written = "blocks.3.hook_mlp_out" if "transcoder" in architecture else RESIDUAL
    assert [site.hook for site in coder.spec.writes] == [written]
    assert (coder.spec.context_length, coder.spec.bos) == (128, "row")
    assert coder.spec.training["released"]["format"] == "saelens"


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu", "matching_pursuit"])
def test_a_decoder_bias_may_be_left_in_the_input(tmp_path, architecture):
    coder = like(tmp_path, config6(architecture, apply_b_dec_to_input=False), drawn(architecture))
    assert coder.spec.pre_bias == "none"


def test_the_decoder_bias_is_subtracted_unless_the_config_says_otherwise(tmp_path):
    config, tensors = config6("standard"), drawn("standard")
    saved(tmp_path, {k: v for k, v in config.items() if k != "apply_b_dec_to_input"}, tensors)
    assert loads(tmp_path, reference(config, tensors)).spec.pre_bias == "decoder"


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_latents_in_units_of_decoder_norms_come_in_these_units(tmp_path, architecture):
    config = config6(architecture, rescale_acts_by_decoder_norm=True)
    coder = like(tmp_path, config, drawn(architecture))
    torch.testing.assert_close(coder.decoder_norms(), torch.ones(D_SAE))


@pytest.mark.parametrize("stop", [True, False])
def test_matching_pursuit_stops_as_the_config_says(tmp_path, stop):
    more = {"residual_threshold": 0.8, "max_iterations": 3, "stop_on_duplicate_support": stop}
    coder = like(tmp_path, config6("matching_pursuit", **more), drawn("matching_pursuit"))
    assert coder.spec.selection == MatchingPursuit(0.8, 3, stop)


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "matching_pursuit", *TRANSCODERS])
def test_inputs_may_be_normalized_by_token(tmp_path, architecture, kind):
    like(tmp_path, config6(architecture, normalize_activations=kind), drawn(architecture), x_scale=3.0)


THEIRS = {  # what SAELens 6.54.12 itself makes of the inputs below
    ("transcoder", "layer_norm"): [[0.46653, -0.06694], [-0.44705, -0.15148]],
    ("transcoder", "constant_norm_rescale"): [[0.6025, 1.58813], [-0.168, -0.291]],
    ("skip_transcoder", "layer_norm"): [[-4.53347, 1.43306], [-4.44705, -1.40148]],
    ("skip_transcoder", "constant_norm_rescale"): [[-4.3975, 3.08813], [-4.168, -1.541]],
    ("jumprelu_transcoder", "layer_norm"): [[0.25, -0.5], [0.25, -0.5]],
    ("jumprelu_transcoder", "constant_norm_rescale"): [[1.15575, 1.3115], [0.25, -0.5]],
    ("jumprelu_skip_transcoder", "layer_norm"): [[-4.75, 1.0], [-3.75, -1.75]],
    ("jumprelu_skip_transcoder", "constant_norm_rescale"): [[-3.84425, 2.8115], [-3.75, -1.75]],
}


@pytest.mark.parametrize(("architecture", "kind"), THEIRS)
def test_a_transcoder_leaves_its_output_where_saelens_does(tmp_path, architecture, kind):
    tensors = {"W_enc": [[1.0, 0.5], [-0.5, 1.0], [0.25, -1.0]], "b_enc": [0.5, 1.5], "b_dec": [0.25, -0.5]}
    tensors["W_dec"] = [[1.0, 2.0], [-1.0, 0.5]]
    if architecture.startswith("jumprelu"):
        tensors["threshold"] = [0.3, 1.0]
    if "skip" in architecture:
        tensors["W_skip"] = [[1.0, 0.0, -1.0], [0.5, 0.5, 0.0]]
    config = config6(architecture, d_in=3, d_sae=2, d_out=2, normalize_activations=kind)
    coder = sae.load(saved(tmp_path, config, {name: np.array(t, np.float32) for name, t in tensors.items()}))
    x = torch.tensor([[1.0, 2.0, 6.0], [-3.0, 0.5, 1.0]])
    np.testing.assert_allclose(coder(x).out.detach().numpy(), THEIRS[architecture, kind], atol=2e-5)


def test_a_transcoder_that_names_no_hook_is_read_and_asked_where_a_model_is(tmp_path):
    config = config6("transcoder", d_out=D_IN)
    for name in ("hook_name", "hook_name_out"):
        del config["metadata"][name]
    tensors = drawn("transcoder")
    tensors |= {"W_dec": tensors["W_dec"][:, :1].repeat(D_IN, 1), "b_dec": np.ones(D_IN, np.float32)}
    coder = like(tmp_path, config, tensors)
    assert not coder.spec.is_autoencoder
    assert ("reads", "not known") in description(coder.spec)
    with pytest.raises(ConfigError, match=r"^site: "), splice(torch.nn.Linear(1, 1), coder):
        pass
    for ask in (evaluate, lambda coder: diagnose(coder, tiny_lm())):
        with pytest.raises(ConfigError, match="names no site to read"):
            ask(coder)
    for write in (native.write, saelens.write):  # and is written as what it is
        write(tmp_path / write.__module__, coder)
        again = sae.load(tmp_path / write.__module__).spec
        assert not again.is_placed
        assert not again.is_autoencoder
    spec = sae.load(tmp_path, site="blocks.1.hook_resid_mid->blocks.1.hook_mlp_out").spec
    assert spec.is_placed
    with pytest.raises(ConfigError, match="is not READ->WRITTEN"):
        sae.load(tmp_path, site="blocks.1.hook_resid_mid")


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "skip_transcoder"])
def test_a_scale_that_the_files_leave_out_is_asked_for(tmp_path, architecture):
    config, tensors = config6(architecture), drawn(architecture)
    folder = saved(tmp_path, {**config, "normalize_activations": "expected_average_only_in"}, tensors)
    with pytest.raises(ConfigError, match=r"^scale: .* mean norm of sqrt\(d_in\).*scale="):
        sae.load(folder)
    skip = tensors.get("W_skip", np.zeros((1, D_IN)))  # of raw inputs and outputs
    inner = reference(config, {**tensors, "W_skip": 0 * skip})

    def wanted(x):
        acts, out, margin = scaled(inner, 0.25)(x)
        return acts, out + x @ skip.T, margin

    coder = sae.load(folder, scale=0.25)
    agrees(coder, wanted, x_scale=4.0)
    assert coder.spec.normalization == Normalization("scalar", 0.25)


def test_a_square_coder_is_read_as_it_is_stored(tmp_path):
    draw = Draw()
    tensors = {"W_enc": draw(D_IN, D_IN), "W_dec": draw(D_IN, D_IN), "b_enc": draw(D_IN), "b_dec": draw(D_IN)}
    like(tmp_path, config6("standard", d_sae=D_IN), tensors)


def test_tokens_left_out_of_training_are_masked(tmp_path):
    more = {"seqpos_slice": [5, None], "exclude_special_tokens": [1, 2]}
    coder = like(tmp_path, config6("standard", metadata=more), drawn("standard"))
    assert coder.spec.mask == MaskSpec((1, 2), 5)
    saved(
        tmp_path, config6("standard", metadata={"seqpos_slice": [5], "exclude_special_tokens": True}), drawn("standard")
    )
    assert sae.load(tmp_path).spec.mask == MaskSpec()


def test_what_lies_beside_a_coder_does_not_disturb(tmp_path):
    config, tensors = config6("standard"), drawn("standard")
    saved(tmp_path, config, tensors)
    write_json(tmp_path / "runner_cfg.json", {"architecture": "topk", "k": 1})
    write_json(tmp_path / "activation_scaler.json", {"scaling_factor": None, "has_whitening": False})
    save_file({"sparsity": np.full(D_SAE, -2.0, np.float32)}, tmp_path / "sparsity.safetensors")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "activations_store_state.safetensors")
    torch.save({"optimizer": {}, "n_training_steps": 3}, tmp_path / "trainer_state.pt")
    agrees(sae.load(tmp_path), reference(config, tensors))


# Heads


def test_heads_are_read_side_by_side_and_one_head_is_refused(tmp_path):
    more = {"hook": "blocks.3.attn.hook_z", "reshape_activations": "hook_z"}
    coder = like(tmp_path, config6("standard", **more), drawn("standard"))
    assert coder.spec.reads[0].hook == "blocks.3.attn.hook_z"
    saved(tmp_path, config6("standard", metadata={"hook_head_index": 2}, **more), drawn("standard"))
    with pytest.raises(ConfigError, match=r"hook_head_index: .* is of one head"):
        sae.load(tmp_path)


# Before version 6


def test_version_3_is_read(tmp_path):
    tensors = drawn("standard")
    coder = loads(
        saved(tmp_path, config3(), tensors), reference(config6("standard", apply_b_dec_to_input=False), tensors)
    )
    assert (coder.spec.pre_bias, coder.spec.context_length, coder.spec.training["dataset"]) == ("none", 64, "some/text")


@pytest.mark.parametrize("architecture", ["gated", "jumprelu"])
def test_version_3_has_other_architectures(tmp_path, architecture):
    tensors = drawn(architecture)
    saved(tmp_path, config3(architecture=architecture), tensors)
    loads(tmp_path, reference(config6(architecture, apply_b_dec_to_input=False), tensors))


def test_topk_was_once_said_by_the_activation_alone(tmp_path):
    tensors = drawn("standard")
    saved(tmp_path, config3(activation_fn_str="topk", activation_fn_kwargs={"k": 4}), tensors)
    coder = loads(tmp_path, reference(config6("topk", k=4, apply_b_dec_to_input=False), tensors))
    assert coder.spec.selection == TopK(4)
    saved(tmp_path, config3(activation_fn_str="topk"), tensors)
    with pytest.raises(DataError, match="k is None, expected a whole number"):
        sae.load(tmp_path)


def test_the_oldest_configs_name_a_hook_point_and_no_architecture(tmp_path):
    config = {"model_name": "gpt2-small", "hook_point": RESIDUAL, "hook_point_layer": 3, "hook_point_head_index": None}
    config |= {"d_in": D_IN, "d_sae": D_SAE, "l1_coefficient": 8e-5, "context_size": 128, "dead_feature_window": 5000}
    tensors = {**drawn("standard"), "scaling_factor": np.ones(D_SAE, np.float32)}
    coder = loads(saved(tmp_path, config, tensors), reference(config6("standard"), tensors))
    assert (coder.spec.reads[0].hook, coder.spec.bos) == (RESIDUAL, "row")


def test_normalization_was_once_yes_or_no(tmp_path):
    tensors = drawn("standard")
    saved(tmp_path, config3(normalize_activations=False, apply_b_dec_to_input=True), tensors)
    loads(tmp_path, reference(config6("standard"), tensors))
    saved(tmp_path, config3(normalize_activations=True), tensors)
    with pytest.raises(ConfigError, match=r"^scale: "):
        sae.load(tmp_path)
    assert sae.load(tmp_path, scale=0.5).spec.normalization == Normalization("scalar", 0.5)


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_factors_fine_tuned_before_the_decoder_are_applied(tmp_path, name):
    tensors, factor = drawn("standard"), Draw(5).positive(D_SAE, low=0.5, high=2.0)
    config = config3(finetuning_scaling_factor=True, apply_b_dec_to_input=True)
    saved(tmp_path, config, {**tensors, name: factor})
    loads(tmp_path, reference(config6("standard"), {**tensors, "W_dec": tensors["W_dec"] * factor[:, None]}))
    saved(tmp_path, {**config, "finetuning_scaling_factor": False}, {**tensors, name: factor})
    with pytest.raises(DataError, match=f"tensor {name} is not all ones, but finetuning_scaling_factor is not set"):
        sae.load(tmp_path)


# Checkpoints of training


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_checkpoint_of_batchtopk_has_one_cut(tmp_path, architecture, rescaled):
    tensors, config = drawn("standard"), config6(architecture, rescale_acts_by_decoder_norm=rescaled, k=2.5)
    config |= {"topk_threshold_lr": 0.01, "matryoshka_widths": [5, D_SAE]}
    saved(tmp_path, config, {**tensors, "topk_threshold": np.array(2.0)})
    n = np.linalg.norm(tensors["W_dec"].astype(np.float64), axis=1) if rescaled else np.ones(D_SAE)
    unit = {"W_enc": tensors["W_enc"] * n, "b_enc": tensors["b_enc"] * n, "W_dec": tensors["W_dec"] / n[:, None]}
    wanted = reference(config6("jumprelu"), {**tensors, **unit, "threshold": np.full(D_SAE, 2.0)})
    coder = loads(tmp_path, wanted)
    assert coder.threshold.dtype == torch.float32
    saved(tmp_path, config, {**tensors, "topk_threshold": np.array(0.0)})
    with pytest.raises(DataError, match=r"topk_threshold is 0\.0: it was not trained yet"):
        sae.load(tmp_path)


def test_older_checkpoints_hold_the_logarithms_of_thresholds(tmp_path):
    tensors = drawn("jumprelu")
    older = {name: tensor for name, tensor in tensors.items() if name != "threshold"}
    saved(tmp_path, config6("jumprelu"), {**older, "log_threshold": np.log(tensors["threshold"])})
    loads(tmp_path, reference(config6("jumprelu"), tensors))


def test_a_checkpoint_has_its_scale_beside_it(tmp_path):
    config, tensors = config6("standard"), drawn("standard")
    saved(tmp_path, {**config, "normalize_activations": "expected_average_only_in"}, tensors)
    write_json(tmp_path / "activation_scaler.json", {"scaling_factor": 0.5, "has_whitening": False})
    agrees(sae.load(tmp_path), scaled(reference(config, tensors), 0.5))


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "gated", "topk"])
def test_a_checkpoint_on_whitened_inputs_has_the_whitening_beside_it(tmp_path, architecture, subtracts):
    config, tensors = config6(architecture, apply_b_dec_to_input=subtracts), drawn(architecture)
    if architecture == "topk":
        config["rescale_acts_by_decoder_norm"] = True
    saved(tmp_path, {**config, "normalize_activations": "covariance_whitening"}, tensors)
    with pytest.raises(DataError, match=r"activation_whitening\.safetensors is not beside it"):
        sae.load(tmp_path)
    rng = np.random.default_rng(3)
    matrix = np.linalg.qr(rng.standard_normal((D_IN, D_IN)))[0] * rng.uniform(0.5, 2.0, D_IN)
    how = {"mean": rng.standard_normal(D_IN), "matrix": matrix, "inverse_matrix": np.linalg.inv(matrix)}
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in how.items()},
        tmp_path / "activation_whitening.safetensors",
    )
    inner = reference(config, tensors)

    def whitened(x):
        acts, out, margin = inner((x - how["mean"]) @ matrix)
        return acts, out @ how["inverse_matrix"] + how["mean"], margin

    loads(tmp_path, whitened)


# Models whose weights are centered


def centered(inner):
    """The coder's own map is of activations without their mean; read raw, the mean is put back."""

    def run(x):
        mean = x.mean(1, keepdims=True)
        acts, out, margin = inner(x - mean)
        return acts, out + mean, margin

    return run


CENTERED = {"center_writing_weights": True}


@pytest.mark.parametrize(
    ("architecture", "hook"),
    [
        ("standard", "blocks.3.hook_resid_pre"),
        ("topk", "blocks.3.hook_mlp_out"),
        ("matching_pursuit", "blocks.3.hook_attn_out"),
    ],
)
def test_a_coder_of_a_centered_model_reads_raw_activations(tmp_path, architecture, hook):
    tensors = drawn(architecture)
    config = config6(architecture, hook=hook, metadata={"model_from_pretrained_kwargs": CENTERED})
    coder = loads(saved(tmp_path, config, tensors), centered(reference(config, tensors)))
    assert coder.spec.normalization.kind == "center"


def test_the_old_config_of_a_centered_model_says_so_too(tmp_path):
    tensors, config = drawn("standard"), config3(model_from_pretrained_kwargs=CENTERED, apply_b_dec_to_input=True)
    loads(saved(tmp_path, config, tensors), centered(reference(config6("standard"), tensors)))


def test_a_scale_and_centered_weights_go_together(tmp_path):
    config, tensors = config6("standard", metadata={"model_from_pretrained_kwargs": CENTERED}), drawn("standard")
    saved(tmp_path, {**config, "normalize_activations": "expected_average_only_in"}, tensors)
    agrees(sae.load(tmp_path, scale=0.5), centered(scaled(reference(config, tensors), 0.5)), x_scale=2.0)


def test_layer_norm_takes_the_mean_out_by_itself(tmp_path):
    more = {"normalize_activations": "layer_norm", "metadata": {"model_from_pretrained_kwargs": CENTERED}}
    config, tensors = config6("standard", **more), drawn("standard")
    assert (
        loads(saved(tmp_path, config, tensors), centered(reference(config, tensors))).spec.normalization.kind
        == "layer_norm"
    )


@pytest.mark.parametrize(
    ("hook", "model"),
    [
        ("blocks.3.attn.hook_z", "gpt2-small"),
        ("blocks.3.mlp.hook_post", "gpt2-small"),
        ("blocks.3.ln2.hook_normalized", "gpt2-small"),
        (RESIDUAL, "gemma-2b"),
        (RESIDUAL, "mistral-7b"),
    ],
)
def test_centered_weights_change_neither_other_places_nor_models_with_rms_norm(tmp_path, hook, model):
    metadata = {"model_from_pretrained_kwargs": CENTERED, "model_name": model}
    assert (
        like(tmp_path, config6("standard", hook=hook, metadata=metadata), drawn("standard")).spec.normalization.kind
        == "none"
    )


@pytest.mark.parametrize("said", [{}, {"center_writing_weights": False}, {"fold_ln": True, "center_unembed": True}])
def test_a_model_is_unprocessed_unless_the_config_says_otherwise(tmp_path, said):
    config = config6("standard", metadata={"model_from_pretrained_kwargs": said})
    assert like(tmp_path, config, drawn("standard")).spec.normalization.kind == "none"


def test_what_the_mean_cannot_be_given_back_to_is_refused(tmp_path):
    metadata = {"model_from_pretrained_kwargs": CENTERED}
    saved(tmp_path, config6("transcoder", hook="blocks.3.ln2.hook_normalized", metadata=metadata), drawn("transcoder"))
    with pytest.raises(ConfigError, match=r"center_writing_weights: .* but is a transcoder"):
        sae.load(tmp_path)
    saved(
        tmp_path,
        config6("standard", normalize_activations="constant_norm_rescale", metadata=metadata),
        drawn("standard"),
    )
    with pytest.raises(ConfigError, match=r"center_writing_weights: .* but is of inputs scaled by token"):
        sae.load(tmp_path)


def test_a_table_may_know_that_a_model_was_processed(tmp_path):
    config, tensors = config3(model_from_pretrained_kwargs={}), drawn("standard")
    plain = reference(config6("standard", apply_b_dec_to_input=False), tensors)
    saved(tmp_path, config, tensors)
    agrees(sae.load(tmp_path, processed=True), centered(plain))
    agrees(sae.load(tmp_path, processed=False), plain)


def test_a_table_may_know_of_a_normalization(tmp_path):
    tensors = drawn("standard")
    saved(tmp_path, config6("standard"), tensors)
    wanted = reference(config6("standard", normalize_activations="constant_norm_rescale"), tensors)
    agrees(sae.load(tmp_path, normalization="constant_norm_rescale"), wanted)


def test_folded_value_biases_are_told(tmp_path, caplog):
    metadata = {"model_from_pretrained_kwargs": {"fold_value_biases": True}}
    with caplog.at_level(logging.WARNING, "sae"):
        like(tmp_path, config6("standard", hook="blocks.3.attn.hook_z", metadata=metadata), drawn("standard"))
        assert "heads without their value biases" in caplog.text
        caplog.clear()
        like(tmp_path, config6("standard", metadata=metadata), drawn("standard"))
    assert not caplog.text


def test_an_age_in_which_models_were_centered_by_default_is_told(tmp_path, caplog):
    tensors, silent = drawn("standard"), {"sae_lens_training_version": "3.11.2", "apply_b_dec_to_input": True}
    with caplog.at_level(logging.WARNING, "sae"):
        for more in (
            {"sae_lens_training_version": "3.19.2"},
            {"model_from_pretrained_kwargs": {"center_writing_weights": False}},
        ):
            sae.load(saved(tmp_path, config3(**{**silent, **more}), tensors))
            sae.load(saved(tmp_path, config3(**{**silent, "model_name": "gemma-2b"}), tensors))
        assert not caplog.text
        assert sae.load(saved(tmp_path, config3(**silent), tensors)).spec.normalization.kind == "none"
    assert "trained by SAELens 3.11.2, which by default read models with centered weights" in caplog.text


# What is refused


@pytest.mark.parametrize(
    ("config", "tensors", "error", "message"),
    [
        (config6("temporal"), drawn("standard"), ConfigError, "architecture: .* temporal SAE"),
        (config6("standrad"), drawn("standard"), DataError, "architecture is 'standrad'; .*Did you mean 'standard'"),
        (
            config6("standard", normalize_activations="layernorm"),
            drawn("standard"),
            DataError,
            "normalize_activations is 'layernorm'",
        ),
        (config3(activation_fn_str="tanh-relu"), drawn("standard"), DataError, "activation_fn is 'tanh-relu'"),
        (
            config3(activation_fn_str="topk", architecture="gated"),
            drawn("gated"),
            DataError,
            "with activation_fn 'topk', is 'gated'",
        ),
        (config6("topk", k=None), drawn("topk"), DataError, "k is None"),
        (config6("standard", d_in=None), drawn("standard"), DataError, "d_in is None"),
        (config6("jumprelu"), drawn("standard"), DataError, "tensor threshold is missing"),
        (config6("standard"), drawn("jumprelu"), DataError, "tensor threshold is not part of this format"),
        (config6("transcoder"), drawn("skip_transcoder"), DataError, "tensor W_skip is not part of this format"),
        (
            config6("transcoder", apply_b_dec_to_input=True),
            drawn("transcoder"),
            DataError,
            "apply_b_dec_to_input is true",
        ),
        (config6("transcoder", d_out=None), drawn("transcoder"), DataError, "d_out is None"),
        (
            config6("transcoder", normalize_activations="covariance_whitening"),
            drawn("transcoder"),
            DataError,
            "it is of whitened inputs",
        ),
        (
            config6("standard", d_sae=D_SAE + 1),
            drawn("standard"),
            DataError,
            r"W_dec has shape \(20, 6\), expected \(21, 6\)",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, config, tensors, error, message):
    with pytest.raises(error, match=message):
        sae.load(saved(tmp_path, config, tensors))


WRONG = (None, True, -1, 10**400, "two\nlines" * 99, [1, "x"], {"x": []})


@pytest.mark.parametrize(
    "config",
    [
        config6("topk", rescale_acts_by_decoder_norm=True),
        config6("matching_pursuit", residual_threshold=0.1, max_iterations=3, stop_on_duplicate_support=True),
        config3(activation_fn_str="topk", activation_fn_kwargs={"k": 3}, finetuning_scaling_factor=True),
        config6("transcoder", normalize_activations="expected_average_only_in"),
    ],
)
def test_whatever_a_config_says_is_read_or_refused_in_one_line(tmp_path, config):
    tensors = drawn(config["architecture"])
    config.setdefault("metadata", {}).update(seqpos_slice=[1, None], exclude_special_tokens=[1])
    config["metadata"].update(model_from_pretrained_kwargs=CENTERED, hook_name_out="a.b")
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    refused = []
    for level, name in [(config, name) for name in config] + [(config["metadata"], n) for n in config["metadata"]]:
        for wrong in WRONG:
            right, level[name] = level[name], wrong
            write_json(tmp_path / "cfg.json", config)
            write_json(tmp_path / "activation_scaler.json", {"scaling_factor": wrong})
            level[name] = right
            try:
                formats.read(Place(LocalFiles(tmp_path), "sae_weights.safetensors"))
            except (ConfigError, DataError) as error:
                refused.append(str(error))
    assert len(refused) > 50
    assert not [error for error in refused if "\n" in error or len(error) > 700]


# What is written

ALIAS = (Site(RESIDUAL, model="some/model"),)
RULES = {
    "relu": ReLU(),
    "topk": TopK(3),
    "gradient_topk": GradientTopK(3),
    "signed_topk": SignedTopK(3),
    "jumprelu": JumpReLU(),
    "gated": Gated(),
    "feature_choice": FeatureChoice(3),
    "mutual_choice": MutualChoice(3),
    "matching_pursuit": MatchingPursuit(0.5, 4),
}


def coder_of(selection, d_out=D_IN, **more):
    """A coder with random tensors."""
    encoder = selection.encoder or "linear"
    more = {"pre_bias": "decoder" if d_out == D_IN else "none", "decoder_norm": "free", "encoder": encoder, **more}
    calibration = (1.5,) if isinstance(selection, MutualChoice) else ()
    coder = SparseCoder(CoderSpec(D_IN, d_out, D_SAE, selection, calibration=calibration, **more))
    draw = Draw(2)
    for name, tensor in coder.state_dict().items():
        random = draw.positive(*tensor.shape) if name == "threshold" else draw(*tensor.shape, scale=0.7)
        tensor.copy_(torch.from_numpy(random))
    if selection.encoder:
        coder.W_enc.data, coder.b_enc.data = coder.W_dec.data, torch.zeros(D_SAE)
    return coder.requires_grad_(False)


def exported(folder, coder):
    """Writes a coder, and asserts that the files say the same by SAELens' rules and by ours."""
    saelens.write(folder, coder)
    config = json.loads((folder / "cfg.json").read_text())
    wanted = reference(config, load_file(folder / "sae_weights.safetensors"))
    agrees(coder, wanted)
    agrees(sae.load(folder), wanted)
    return config


@pytest.mark.parametrize("bias", ["decoder", "none"])
@pytest.mark.parametrize("name", RULES)
def test_autoencoders_are_written(tmp_path, name, bias):
    coder = coder_of(RULES[name], reads=ALIAS, writes=ALIAS, pre_bias=bias)
    if coder.spec.encoding.pursues and bias == "none":
        coder.b_dec.data.zero_()
    config = exported(tmp_path, coder)
    assert config["metadata"]["hook_name"] == RESIDUAL
    assert (config["metadata"]["model_name"], config["metadata"]["model_class_name"]) == (
        "some/model",
        "HookedTransformer",
    )
    assert sae.load(tmp_path).spec.reads == ALIAS


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", ["relu", "jumprelu", "mutual_choice", "feature_choice"])
def test_transcoders_are_written(tmp_path, name, skip):
    reads, writes = (Site("model.layers.3.norm"),), (Site("model.layers.3.mlp"),)
    config = exported(tmp_path, coder_of(RULES[name], D_OUT, skip=skip, reads=reads, writes=writes))
    assert config["metadata"]["hook_name_out"] == "model.layers.3.mlp"
    assert config["metadata"]["model_class_name"] == "AutoModelForCausalLM"
    assert sae.load(tmp_path).spec.writes == writes


def test_an_autoencoder_with_a_skip_path_is_written_as_a_transcoder(tmp_path):
    coder = coder_of(ReLU(), skip=True, pre_bias="none", reads=ALIAS, writes=ALIAS)
    assert exported(tmp_path, coder)["architecture"] == "skip_transcoder"
    assert sae.load(tmp_path).spec.is_autoencoder


def test_a_scale_is_folded_when_written(tmp_path):
    site = replace(ALIAS[0], width=D_IN, scale=0.5)
    coder = coder_of(JumpReLU(), normalization=Normalization("scalar", 3.0), reads=(site,), writes=(site,))
    assert exported(tmp_path, coder)["normalize_activations"] == "none"


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("skip", [True, False])
def test_what_a_transcoder_leaves_normalized_is_written_so(tmp_path, skip, kind):
    mine = replace(saelens.NORMALIZATIONS[kind], undone=False)
    sites = {"reads": (Site("model.layers.3.norm"),), "writes": (Site("model.layers.3.mlp"),)}
    config = exported(tmp_path, coder_of(JumpReLU(), D_OUT, skip=skip, normalization=mine, **sites))
    assert config["normalize_activations"] == kind
    assert sae.load(tmp_path).spec.normalization == mine
    undone = coder_of(ReLU(), skip=True, pre_bias="none", normalization=replace(mine, undone=True))
    with pytest.raises(ConfigError, match=r"normalization\.undone: SAELens cannot say True"):
        saelens.write(tmp_path, undone)


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_normalization_by_token_is_written_where_it_is_theirs(tmp_path, kind):
    mine = saelens.NORMALIZATIONS[kind]
    assert exported(tmp_path, coder_of(TopK(3), normalization=mine))["normalize_activations"] == kind
    with pytest.raises(ConfigError, match=r"normalization\.eps: SAELens cannot say 0\.01, .* it can say"):
        saelens.write(tmp_path, coder_of(TopK(3), normalization=replace(mine, eps=0.01)))


@pytest.mark.parametrize("kind", ["none", "scalar"])
@pytest.mark.parametrize("name", ["mutual_choice", "feature_choice"])
def test_a_cut_in_units_of_decoder_norms_becomes_one_of_each_latent(tmp_path, name, kind):
    coder = coder_of(RULES[name], select_by_decoder_norm=True, normalization=Normalization(kind, 0.5))
    assert exported(tmp_path, coder)["architecture"] == "jumprelu"


def test_a_unit_decoder_needs_no_units(tmp_path):
    coder = coder_of(TopK(3), select_by_decoder_norm=True)
    with pytest.raises(ConfigError, match=r"select_by_decoder_norm: .* units of the decoder's norms"):
        saelens.write(tmp_path, coder)
    coder.W_dec.data /= coder.W_dec.norm(dim=1, keepdim=True)
    assert exported(tmp_path, coder)["rescale_acts_by_decoder_norm"] is False


def test_heads_and_masks_are_written(tmp_path):
    heads = (Site("blocks.3.attn.hook_z", heads=2),)
    config = exported(tmp_path, coder_of(ReLU(), reads=heads, writes=heads, mask=MaskSpec((7,), 4), context_length=32))
    assert config["reshape_activations"] == "hook_z"
    spec = sae.load(tmp_path).spec
    assert (spec.mask, spec.context_length) == (MaskSpec((7,), 4), 32)


TWO = (Site("a", width=3), Site("b", width=3))
INPUT = (Site("model.layers.3", "input"),)


@pytest.mark.parametrize(
    ("coder", "message"),
    [
        (coder_of(GroupMax(4)), "selection: SAELens cannot say 'groupmax'"),
        (coder_of(TopK(3), D_OUT), "selection: SAELens cannot say 'topk'"),
        (coder_of(GradientTopK(3, inference="gradient")), "selection.inference: SAELens cannot say 'gradient'"),
        (coder_of(ReLU(), encoder="glu"), "encoder: SAELens cannot say 'glu'"),
        (coder_of(ReLU(), pre_bias="own"), "pre_bias: SAELens cannot say 'own'"),
        (coder_of(ReLU(), reads=(Site("a"),), writes=(Site("b"),)), "pre_bias: SAELens cannot say 'decoder'"),
        (coder_of(ReLU(), normalization=Normalization("center")), "normalization: SAELens cannot say 'center'"),
        (coder_of(MatchingPursuit(), normalization=Normalization("scalar", 2.0)), "normalization: .* 'scalar'"),
        (coder_of(MatchingPursuit(), pre_bias="none"), "pre_bias: .* matching pursuit adds b_dec only where"),
        (
            coder_of(ReLU(), normalization=replace(saelens.NORMALIZATIONS["layer_norm"], unbiased=False)),
            r"normalization\.unbiased",
        ),
        (
            coder_of(ReLU(), normalization=Normalization("layer_norm")),
            r"normalization\.undo_eps: SAELens cannot say True",
        ),
        (coder_of(ReLU(), reads=TWO, writes=TWO), "sites: SAELens cannot say 2"),
        (coder_of(ReLU(), reads=INPUT, writes=INPUT), "hook_name: .* not 'model.layers.3:input'"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(tmp_path, coder, message):
    with pytest.raises(ConfigError, match=message):
        saelens.write(tmp_path / "out", coder)
    assert not (tmp_path / "out").exists()


def test_an_uncalibrated_cut_is_not_written(tmp_path):
    coder = coder_of(MutualChoice(3))
    coder.spec = coder.spec.with_(calibration=())
    with pytest.raises(ConfigError, match="calibration: SAELens needs a threshold"):
        saelens.write(tmp_path, coder)


def test_every_rule_is_either_written_or_refused():
    assert {"relu", "topk", "jumprelu"} <= saelens.RULES.keys() <= set(Selection.get_known_choices())
