"""sparsify, from its configs and tensors."""

import json
from typing import Any

import pytest
import torch
from rigs.format_files import D_IN, D_SAE, Draw, agrees, loads
from rigs.released.sparsify import SKIP, K, coder, reference, release
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import sae
from sae.base.errors import ConfigError, DataError
from sae.coder.normalization import Normalization
from sae.formats import sparsify
from sae.lm.hooks import capture
from sae.lm.models import LanguageModel
from sae.lm.site import Site
from sae.loading.hub import load_all
from sae.selection.groupmax import GroupMax
from sae.selection.relu import ReLU
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK


def test_an_autoencoder_reads_the_output_of_the_module_that_its_folder_names(tmp_path):
    folder, wanted = release(tmp_path / "run")
    for path in (folder, tmp_path / "run"):
        spec = loads(path, wanted).spec
        assert spec.selection == TopK(K)
        assert spec.reads == spec.writes == (Site("layers.10", model="EleutherAI/pythia-70m"),)
        assert (spec.context_length, spec.training["dataset"]) == (64, "d")


def test_groupmax_keeps_the_largest_of_every_group(tmp_path):
    folder, wanted = release(tmp_path, config={"activation": "groupmax"})
    assert loads(folder, wanted).spec.selection == GroupMax(K)


def test_a_transcoder_goes_from_input_to_output_without_a_pre_bias(tmp_path):
    folder, wanted = release(tmp_path, "layers.3.mlp", config=SKIP, d_out=D_IN + 1)
    spec = loads(folder, wanted).spec
    assert [site.name for site in (*spec.reads, *spec.writes)] == ["layers.3.mlp:input", "layers.3.mlp"]
    assert (spec.pre_bias, spec.skip) == ("none", True)


def test_a_transcoder_without_the_field_that_came_with_the_change_is_asked_about(tmp_path):
    folder, wanted = release(tmp_path, "layers.3.mlp", old=("activation",), config=SKIP)
    with pytest.raises(ConfigError, match=r"^pre_bias: .*sae\.safetensors does not say it .*pre_bias=none or decoder"):
        sae.load(folder)
    with pytest.raises(ConfigError, match="pre_bias: 'own' is not one of none, decoder"):
        sae.load(folder, pre_bias="own")
    loads(folder, lambda x: wanted(x, subtract=True), pre_bias="decoder")
    loads(folder, lambda x: wanted(x, subtract=False), pre_bias="none")


def test_the_first_versions_are_signed_sized_by_expansion_and_hold_a_linear_decoder(tmp_path):
    config = {"signed": True, "num_latents": 0, "expansion_factor": 4}
    shapes = {"encoder.weight": (4 * D_IN, D_IN), "encoder.bias": (4 * D_IN,), "W_dec": (4 * D_IN, D_IN)}
    draw = Draw(3)
    tensors = {name: lambda stored, shape=shape: torch.from_numpy(draw(*shape)) for name, shape in shapes.items()}
    old = ("activation", "multi_topk", "skip_connection")
    folder, wanted = release(tmp_path, old=old, config=config, tensors=tensors)
    assert loads(folder, wanted).spec.selection == SignedTopK(K)
    stored = load_file(folder / "sae.safetensors")
    stored["decoder.weight"] = stored.pop("W_dec").T.contiguous()
    save_file(stored, folder / "sae.safetensors")
    loads(folder, wanted)


def test_a_square_linear_decoder_is_read_as_torch_stores_it(tmp_path):
    folder, _ = release(
        tmp_path,
        config={"num_latents": D_IN, "k": 2},
        tensors={
            "encoder.weight": lambda stored: stored["encoder.weight"][:D_IN],
            "encoder.bias": lambda stored: stored["encoder.bias"][:D_IN],
            "W_dec": lambda stored: None,
            "decoder.weight": lambda stored: torch.from_numpy(Draw(5)(D_IN, D_IN)),
        },
    )
    stored = load_file(folder / "sae.safetensors")
    assert torch.equal(sae.load(folder).W_dec, stored["decoder.weight"].T)


def test_half_precision_is_read_as_it_is_stored(tmp_path):
    folder, wanted = release(tmp_path, dtype="float16")
    loads(folder, wanted)
    assert sae.load(folder, lazy=True).W_enc.dtype == torch.float16


def test_seeds_of_a_module_are_coders_of_it(tmp_path):
    for seed in (0, 1):
        release(tmp_path, f"layers.2/seed{seed}")
    found = load_all(tmp_path)
    assert list(found) == ["layers.2/seed0", "layers.2/seed1"]
    assert {coder.spec.reads for coder in found.values()} == {(Site("layers.2", model="EleutherAI/pythia-70m"),)}


@pytest.mark.parametrize("name", ["embed_tokens", "h.3", "encoder.layer.3", "layers.3.self_attn.o_proj"])
def test_module_paths_are_known_by_their_form(tmp_path, name):
    folder, _ = release(tmp_path, name)
    assert sae.load(folder).spec.reads[0].hook == name


def test_a_coder_at_the_root_has_the_site_that_the_user_gives(tmp_path):
    folder, wanted = release(tmp_path, "sae-llama-3-8b", root=False)
    assert loads(folder, wanted).spec.reads == ()
    coder = loads(folder, wanted, site="layers.4", model="m")
    assert coder.spec.writes == coder.spec.reads == (Site("layers.4", model="m"),)
    folder, wanted = release(tmp_path, "skip", config=SKIP)
    spec = loads(folder, wanted, site="layers.4.mlp:input->layers.5").spec
    assert [site.name for site in (*spec.reads, *spec.writes)] == ["layers.4.mlp:input", "layers.5"]


def test_the_names_of_modules_are_found_below_the_base_model(tmp_path):
    config = LlamaConfig(
        hidden_size=D_IN, intermediate_size=8, num_hidden_layers=2, num_attention_heads=3, vocab_size=30
    )
    none: Any = None
    lm = LanguageModel(LlamaForCausalLM(config).eval(), none, "m", None, True)
    folder, _ = release(tmp_path, "layers.1.mlp", config=SKIP)
    spec = sae.load(folder).spec
    seen = capture(lm, [*spec.reads, *spec.writes], torch.randint(0, 30, (2, 5)))
    mlp = lm.model.model.layers[1].mlp
    assert torch.allclose(mlp(seen["layers.1.mlp:input"]), seen["layers.1.mlp"], atol=1e-6)
    for hook, message in (("mlp", r"sites: 'mlp' is ambiguous"), ("layers.*", r"sites: 'layers\.\*' means 2 modules")):
        with pytest.raises(ConfigError, match=message):
            capture(lm, [Site(hook)], torch.randint(0, 30, (2, 5)))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"activation": "jumprelu"}, DataError, "activation is 'jumprelu'; known are"),
        ({"activation": "groupmax", "signed": True}, ConfigError, "signed: .* not of groupmax"),
        ({"embed_skip": True}, ConfigError, "embed_skip: .* has True, which is not known"),
        ({"k": None}, DataError, "k is None, expected a whole number"),
        ({"num_latents": 0, "expansion_factor": None}, DataError, "expansion_factor is None"),
        ({"num_latents": D_SAE + 1}, DataError, r"encoder\.weight has shape \(20, 6\), expected \(21, 6\)"),
        ({"skip_connection": True, "transcode": True, "k": 0}, ConfigError, r"selection\.k: 0 is not between"),
    ],
)
def test_what_a_config_says_beside_what_is_known_is_refused(tmp_path, config, error, message):
    folder, _ = release(tmp_path, config=config)
    with pytest.raises(error, match=message):
        sae.load(folder)


def test_tensors_that_the_config_does_not_speak_of_are_refused(tmp_path):
    folder, _ = release(tmp_path, tensors={"W_skip": lambda stored: torch.zeros(D_IN, D_IN)})
    with pytest.raises(DataError, match="tensor W_skip is not part of this format"):
        sae.load(folder)


@pytest.mark.parametrize(
    "written",
    [
        coder(),
        coder(selection=GroupMax(K)),
        coder("none", "input"),
        coder("none", "input", skip=True),
        coder(reads=(), writes=()),
    ],
)
def test_what_is_written_loads_as_the_same_coder(tmp_path, written):
    sparsify.write(tmp_path / "x", written)
    stored = {name: t.double().numpy() for name, t in load_file(tmp_path / "x" / "sae.safetensors").items()}
    config = json.loads((tmp_path / "x" / "cfg.json").read_text())
    found = sae.load(tmp_path / "x")
    agrees(found, lambda x: reference(x, stored, config))
    agrees(written, lambda x: reference(x, stored, config))
    for name in ("selection", "pre_bias", "reads", "writes", "skip", "context_length"):
        assert getattr(found.spec, name) == getattr(written.spec, name)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (coder(selection=SignedTopK(K)), "selection: sparsify cannot say 'signed_topk'"),
        (coder(selection=ReLU()), "selection: sparsify cannot say 'relu'"),
        (coder(normalization=Normalization("scalar", 2.0)), "normalization: sparsify cannot say 'scalar'"),
        (coder(select_by_decoder_norm=True), "select_by_decoder_norm: "),
        (coder("none"), "pre_bias: sparsify cannot say 'none' of an autoencoder"),
        (coder("decoder", "input"), "pre_bias: sparsify cannot say 'decoder' of a transcoder"),
        (coder("none", "input", d_out=D_IN + 1), "d_out: sparsify cannot say 7"),
        (coder(reads=(Site("a", "input"),), writes=(Site("a", "input"),)), "reads: sparsify cannot say 'a:input' to"),
        (coder("none", "input", writes=(Site("b"),)), "reads: sparsify cannot say 'model.layers.1:input' to 'b'"),
        (coder(reads=(Site("blocks.1.hook_resid_pre"),), writes=(Site("blocks.1.hook_resid_pre"),)), "reads: "),
    ],
)
def test_what_the_format_cannot_say_is_named_before_anything_is_written(tmp_path, lost, message):
    with pytest.raises(ConfigError, match=message):
        sparsify.write(tmp_path / "x", lost)
    assert not (tmp_path / "x").exists()


def test_nothing_that_is_not_finite_is_written(tmp_path):
    broken = coder()
    broken.W_dec[0, 0] = torch.nan
    with pytest.raises(DataError, match="tensor W_dec holds NaN or Inf"):
        sparsify.write(tmp_path / "x", broken)
    assert not (tmp_path / "x").exists()
