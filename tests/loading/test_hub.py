"""Coders on disk: bit for bit back again, and one line about what is missing, foreign or damaged."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import sae
from sae.base.errors import ConfigError, DataError
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.normalization import Normalization
from sae.coder.spec import CoderSpec
from sae.lm.masking import MaskSpec
from sae.lm.site import Site
from sae.selection.topk import TopK


@pytest.fixture
def coder():
    site = Site("model.layers.3.self_attn.o_proj", "input", "some/model", "abc", 8)
    spec = CoderSpec(
        6,
        6,
        20,
        TopK(3),
        reads=(site,),
        writes=(site,),
        pre_bias="own",
        normalization=Normalization("scalar", 0.123456789),
        select_by_decoder_norm=True,
        decoder_norm="free",
        skip=True,
        mask=MaskSpec((0, 5), 2, {"x": 34.5}, True),
        context_length=128,
        variance=2.5,
        training={"text": {"source": "x"}, "tokens": 10**12},
        metrics={"reconstruction": {"fvu": 0.1}},
    )
    made = SparseCoder(spec)
    initialize(made, torch.randn(6), 0)
    with torch.no_grad():
        made.W_skip.normal_()
        made.b_pre.normal_()
    return made


@pytest.fixture
def folder(coder, tmp_path):
    sae.save(coder, tmp_path / "coder")
    return tmp_path / "coder"


def test_a_coder_comes_back_bit_for_bit(coder, folder):
    again = sae.load(folder)
    assert again.spec == coder.spec
    for name, parameter in coder.named_parameters():
        assert torch.equal(parameter, getattr(again, name))
        assert not getattr(again, name).requires_grad
    x = torch.randn(7, 6)
    assert torch.equal(again(x).out, coder(x).out.detach())


def test_precision_and_the_folder_of_a_run(coder, folder):
    assert sae.load(folder, dtype=torch.bfloat16).W_enc.dtype == torch.bfloat16
    assert sae.load(folder.parent).spec == coder.spec
    sae.save(coder, folder.parent / "other")
    with pytest.raises(
        ConfigError, match=r"is not one coder; it holds 2: coder/sae\.safetensors, other/sae\.safetensors"
    ):
        sae.load(folder.parent)


def test_folders_without_a_coder(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no such folder: .*codr\. Did you mean 'coder'\?"):
        sae.load(tmp_path / "codr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no coder in a known format; its files are none"):
        sae.load(tmp_path / "empty")


def test_a_run_that_is_not_there_is_not_asked_of_the_hub(coder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ConfigError, match=r"^path: no such folder: runs/quickstart\. A run is .* train first"):
        sae.load("runs/quickstart")
    sae.save(coder, "mine/quickstart")
    with pytest.raises(
        ConfigError, match=r"no such folder: mine/quickstrat\. Did you mean 'quickstart'\? .* train first"
    ):
        sae.load("mine/quickstrat")
    with pytest.raises(ConfigError, match=r"no such folder: ./mien/quickstart\. Did you mean 'mine/quickstart'\?"):
        sae.load("./mien/quickstart")
    begun = tmp_path / "runs" / "begun"
    begun.mkdir(parents=True)
    for name in ("config.yaml", "env.json"):
        (begun / name).write_text("{}")
    with pytest.raises(
        ConfigError, match=r"has trained no coder to its end yet; go on with sae-train --resume .*begun"
    ):
        sae.load("runs/begun")


@pytest.mark.parametrize("typed", ["hf://mine/coder", "owner/quickstrat"])
def test_what_may_be_of_the_hub_is_asked_there(coder, tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    sae.save(coder, "mine/quickstart")
    with pytest.raises(
        ConfigError, match=r"^path: the hub cannot be asked .* no folder is called so.* once it is trained"
    ):
        sae.load(typed, cache_dir=tmp_path / "hub")


def changed_config(folder, **changes):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def changed_tensors(folder, change):
    tensors = load_file(folder / "sae.safetensors")
    change(tensors)
    save_file(tensors, folder / "sae.safetensors")


def test_weights_that_are_not_those_of_the_config_are_damaged(folder):
    changed_tensors(folder, lambda tensors: tensors["b_dec"].add_(1))
    with pytest.raises(DataError, match=r"sae\.safetensors is damaged: its sha256 differs from the one in cfg\.json"):
        sae.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("W_dec"), "tensor W_dec is missing"),
        (lambda t: t.update(W_decc=t.pop("W_dec")), "tensor W_dec is missing. Did you mean 'W_decc'"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is not part of this coder"),
        (lambda t: t.update(W_enc=t["W_enc"].T.contiguous()), r"tensor W_enc has shape \(6, 20\), expected \(20, 6\)"),
        (lambda t: t["b_dec"].fill_(float("nan")), "tensor b_dec holds NaN or Inf"),
    ],
    ids=["missing", "renamed", "extra", "transposed", "nan"],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    changed_tensors(folder, change)
    changed_config(folder, sha256=None)  # or the change is found before it is looked at
    with pytest.raises(DataError, match=message):
        sae.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, r"cfg\.json: format_version: 99 is newer than 2; upgrade sae-interp"),
        ({"d_ina": 3}, "coder spec: d_ina: no such field. Did you mean 'd_in'"),
        ({"selection": {"type": "tokp", "k": 3}}, "selection.type: 'tokp' is not one of .* Did you mean 'topk'"),
        ({"d_in": "six"}, "coder spec: d_in: 'six' is not a whole number"),
        ({"d_sae": 10**12}, "coder spec: d_sae: 1000000000000 is not a width"),
        ({"normalization": {"kind": "scaler"}}, "normalization.kind: 'scaler' is not one of .* Did you mean 'scalar'"),
    ],
    ids=["newer", "unknown", "selection", "type", "huge", "normalization"],
)
def test_a_spec_that_is_not_ours_is_named(folder, change, message):
    changed_config(folder, **change)
    with pytest.raises(DataError, match=message):
        sae.load(folder)


def test_a_cut_file_is_named(folder):
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"sae\.safetensors"):
        sae.load(folder)


def test_what_is_not_finite_is_not_saved_over_what_is(coder, folder):
    with torch.no_grad():
        coder.W_enc[0, 0] = float("nan")
    with pytest.raises(DataError, match="W_enc: holds NaN or Inf"):
        sae.save(coder, folder)
    assert torch.isfinite(sae.load(folder).W_enc).all()


@pytest.mark.slow
def test_loading_needs_no_other_import(tmp_path):
    """In a process of its own: nothing else has registered the plug-ins that a saved spec names."""
    sae.save(SparseCoder(CoderSpec(4, 4, 8, TopK(2))), tmp_path)
    code = f"import sae; print(sae.load({str(tmp_path)!r}).spec.selection)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(TopK(2))
