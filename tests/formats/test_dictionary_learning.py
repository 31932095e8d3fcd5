"""dictionary_learning's seven classes in its own layout, its checkpoints and backups, and what is written for it."""

import json
import logging

import pytest
import torch
from rigs.format_files import D_IN, D_SAE, Draw, agrees, loads, write_json
from rigs.released.dictionary_learning import CUT, OPTIMIZER, SHAPES, K, config, reference, state, write

import sae
from sae.base.errors import ConfigError, DataError
from sae.coder.coder import SparseCoder
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.formats import dictionary_learning
from sae.lm.site import Site
from sae.selection.gated import Gated
from sae.selection.jumprelu import JumpReLU
from sae.selection.mutual_choice import MutualChoice
from sae.selection.relu import ReLU
from sae.selection.signed_topk import SignedTopK
from sae.selection.topk import TopK

SITES = (Site("blocks.3.hook_resid_post", model="m"),)


@pytest.mark.parametrize("kind", SHAPES)
def test_every_class_does_what_the_library_does(tmp_path, kind):
    coder = loads(*write(tmp_path, kind))
    assert coder.spec.reads == coder.spec.writes == (Site("blocks.3.hook_resid_post", model="google/gemma-2-2b"),)
    assert (coder.spec.context_length, coder.spec.decoder_norm) == (128, "free")


def test_a_threshold_that_was_never_set_gives_way_to_k(tmp_path, caplog):
    folder, wanted = write(tmp_path, "BatchTopKSAE", cut=-1.0)
    with caplog.at_level(logging.WARNING):
        coder = loads(folder, wanted)
    assert coder.spec.selection == MutualChoice(K)
    assert not coder.spec.calibration
    assert "threshold was never set" in caplog.text


def test_a_threshold_of_zero_was_set(tmp_path):
    assert loads(*write(tmp_path, "BatchTopKSAE", cut=0.0)).spec.calibration == (0.0,)


def test_older_files_say_k_in_the_config_alone(tmp_path):
    folder, wanted = write(tmp_path, "AutoEncoderTopK")
    torch.save({n: t for n, t in state("AutoEncoderTopK").items() if n not in ("k", "threshold")}, folder / "ae.pt")
    assert loads(folder, wanted).spec.selection == TopK(K)


def test_two_values_of_k_are_refused(tmp_path):
    folder, _ = write(tmp_path, "AutoEncoderTopK", k=4)
    with pytest.raises(DataError, match=r"trainer\.k is 4, but tensor k holds 3"):
        sae.load(folder)
    write_json(folder / "config.json", config("AutoEncoderTopK", k=None))
    tensors = state("AutoEncoderTopK")
    del tensors["k"]
    torch.save(tensors, folder / "ae.pt")
    with pytest.raises(DataError, match=r"trainer\.k is None"):
        sae.load(folder)


@pytest.mark.parametrize(
    ("kind", "said", "tensor"),
    [
        ("AutoEncoder", "AutoEncoderTopK", "no tensor b_dec"),
        ("AutoEncoderTopK", "AutoEncoder", "no tensor bias"),
        ("JumpReluAutoEncoder", "GatedAutoEncoder", "no tensor encoder.weight"),
        ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder", r"threshold has shape \(\)"),
        ("BatchTopKSAE", "AutoEncoderNew", "no tensor decoder.bias"),
    ],
)
def test_a_class_that_its_tensors_contradict_is_refused(tmp_path, kind, said, tensor):
    folder, _ = write(tmp_path, kind, dict_class=said)
    with pytest.raises(DataError, match=tensor):
        sae.load(folder)


def test_an_unknown_class_is_named(tmp_path):
    folder, _ = write(tmp_path, dict_class="AutoEncoderTopk")
    with pytest.raises(DataError, match=r"dict_class is 'AutoEncoderTopk'.*Did you mean 'AutoEncoderTopK'"):
        sae.load(folder)


@pytest.mark.parametrize(
    ("said", "hook"),
    [
        ({"submodule_name": "model.layers.3.mlp"}, "model.layers.3.mlp"),
        ({"submodule_name": None}, "blocks.3.hook_resid_post"),  # by the folder's name
        ({"submodule_name": "mlp_out_layer_3"}, None),
        ({"submodule_name": "mlp_out_layer_3", "hint": "layers.3.mlp"}, "layers.3.mlp"),
    ],
)
def test_the_site_is_what_config_folder_or_user_say(tmp_path, said, hook):
    hint = said.pop("hint", None)
    folder, wanted = write(tmp_path / "resid_post_layer_3" / "trainer_0", **said)
    assert [site.hook for site in loads(folder, wanted, site=hint).spec.reads] == ([hook] if hook else [])


def test_a_checkpoint_finds_its_config_one_folder_up(tmp_path):
    folder, wanted = write(tmp_path / "trainer_0", "GatedAutoEncoder")
    (folder / "checkpoints").mkdir()
    (folder / "ae.pt").rename(folder / "checkpoints" / "ae_500.pt")
    for address in (folder, folder / "checkpoints", folder / "checkpoints" / "ae_500.pt"):
        loads(address, wanted)


@pytest.mark.parametrize("kind", ["AutoEncoder", "BatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder"])
def test_a_backup_is_of_scaled_inputs(tmp_path, kind):
    folder, wanted = write(tmp_path, kind)
    tensors, factor = state(kind), 4.0
    backup = {"step": 7, "ae": tensors, "optimizer": OPTIMIZER, "config": config(kind)["trainer"]}
    torch.save({**backup, "norm_factor": factor}, folder / "ae.pt")

    def scaled(x):
        acts, out, margin = wanted(x / factor)
        return acts, out * factor, margin

    assert loads(folder, scaled, x_scale=factor).spec.normalization == Normalization("scalar", 0.25)  # the file's word
    torch.save({**backup, "norm_factor": None}, folder / "ae.pt")
    with pytest.raises(ConfigError, match=r"^scale: .*backup without norm_factor"):
        sae.load(folder)
    loads(folder, scaled, x_scale=factor, scale=0.25)
    loads(folder, wanted, scale=1)


def made(selection, pre_bias="decoder", unit=False, sites=SITES, **said):
    spec = CoderSpec(
        D_IN, D_IN, D_SAE, selection, sites, said.pop("writes", sites), pre_bias=pre_bias, context_length=64, **said
    )
    coder, draw = SparseCoder(spec), Draw(3)
    tensors = {name: torch.from_numpy(draw(*tensor.shape)) for name, tensor in coder.state_dict().items()}
    if "threshold" in tensors:
        tensors["threshold"] = torch.from_numpy(draw.positive(D_SAE))
    if unit:
        tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"], dim=1)
    coder.load_state_dict(tensors)
    return coder.requires_grad_(False)


WRITABLE = {
    "AutoEncoder": lambda: made(ReLU(), unit=True),
    "AutoEncoderNew": lambda: made(ReLU(), "none"),
    "AutoEncoderTopK": lambda: made(TopK(K)),
    "BatchTopKSAE": lambda: made(MutualChoice(K), calibration=(CUT,)),
    "JumpReluAutoEncoder": lambda: made(JumpReLU(), "none"),
    "GatedAutoEncoder": lambda: made(Gated()),
}


@pytest.mark.parametrize("kind", WRITABLE)
def test_what_is_written_is_what_the_library_computes(tmp_path, kind):
    coder = WRITABLE[kind]()
    dictionary_learning.write(tmp_path, coder)
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert (trainer["dict_class"], trainer["layer"], trainer["lm_name"]) == (kind, 3, "m")
    assert trainer["submodule_name"] == "resid_post_layer_3"
    written = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert {n: tuple(t.shape) for n, t in written.items() if n not in ("k", "threshold")} == SHAPES[kind]
    agrees(coder, reference(kind, written))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ae.pt", "config.json"]


@pytest.mark.parametrize("kind", WRITABLE)
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, kind):
    coder = WRITABLE[kind]()
    dictionary_learning.write(tmp_path, coder)
    back, x = sae.load(tmp_path), torch.randn(40, D_IN)
    assert (back.spec.reads, back.spec.pre_bias, back.spec.context_length) == (
        coder.spec.reads,
        coder.spec.pre_bias,
        64,
    )
    for name, tensor in coder.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    assert torch.equal(back(x).out, coder(x).out)
    assert torch.equal(back.encode(x).to_dense(), coder.encode(x).to_dense())


@pytest.mark.parametrize("hook", ["model.layers.3.mlp", "transformer.wte", ""])
def test_other_sites_are_written_as_module_paths(tmp_path, hook):
    sites = (Site(hook, model="m"),) if hook else ()
    dictionary_learning.write(tmp_path, made(TopK(K), sites=sites))
    assert sae.load(tmp_path).spec.reads == sites


@pytest.mark.parametrize(
    ("coder", "field"),
    [
        (lambda: made(ReLU()), "decoder_norm"),
        (lambda: made(TopK(K), "none"), "pre_bias"),
        (lambda: made(JumpReLU()), "pre_bias"),
        (lambda: made(TopK(K), "own"), "pre_bias"),
        (lambda: made(SignedTopK(K)), "selection"),
        (lambda: made(MutualChoice(K)), "calibration"),
        (lambda: made(TopK(K), normalization=Normalization("layer_norm")), "normalization"),
        (lambda: made(TopK(K), select_by_decoder_norm=True), "select_by_decoder_norm"),
        (lambda: made(TopK(K), skip=True), "skip"),
        (lambda: made(ReLU(), "none", writes=(Site("blocks.4.hook_resid_post", model="m"),)), "writes"),
        (lambda: made(TopK(K), sites=(Site("model.layers.3", side="input"),)), "reads"),
        (lambda: made(TopK(K), sites=(Site("a", width=2), Site("b", width=D_IN - 2))), "sites"),
    ],
)
def test_what_the_library_cannot_say_is_refused_before_anything_is_written(tmp_path, coder, field):
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        dictionary_learning.write(tmp_path / "there", coder())
    assert not (tmp_path / "there").exists()


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    coder = made(TopK(K))
    coder.b_dec[2] = torch.nan
    with pytest.raises(DataError, match="b_dec holds NaN"):
        dictionary_learning.write(tmp_path / "there", coder)
    assert not (tmp_path / "there").exists()
